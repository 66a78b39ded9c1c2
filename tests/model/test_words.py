"""The word encoder: what is understood, what is ignored, what reaches the rows."""

from __future__ import annotations

import pytest
import torch

from echo_ray.errors import ConfigError
from echo_ray.model.words import (
    IDS,
    PADDING,
    SILENT,
    SYNONYMS,
    VOCABULARY,
    WordTextEncoder,
    padded_ids,
    read_prompt,
)
from echo_ray.preset import WordTextShape


@pytest.fixture
def encoder() -> WordTextEncoder:
    torch.manual_seed(5)
    return WordTextEncoder(WordTextShape(layers=2, heads=2), 16, 8).requires_grad_(False)


def words(prompt: str) -> list[str]:
    return [VOCABULARY[i] for i in read_prompt(prompt)[0]]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red ball on a blue background", "red ball on blue background"),
        ("A RED Ball, on: a blue background!", "red ball on blue background"),
        ("one crimson circle over the navy sky", "red ball on blue background"),
        ("it comes back", "back"),
        ("a tiny purple box drifting fast", "small magenta square moving quickly"),
        ("", ""),
        ("42 łódź ?!", ""),
    ],
)
def test_words_and_synonyms(prompt: str, expected: str) -> None:
    assert words(prompt) == expected.split()


def test_the_tables_do_not_contradict_each_other() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    assert not SYNONYMS.keys() & IDS.keys()
    assert not SILENT & (SYNONYMS.keys() | IDS.keys())
    assert set(SYNONYMS.values()) <= IDS.keys()


def test_understood_and_ignored_keep_the_prompts_own_words(encoder: WordTextEncoder) -> None:
    understood, ignored = encoder.understood("Please show a crimson circle dancing on a wall")
    assert understood == ["crimson", "circle", "on", "wall"]
    assert ignored == ["please", "show", "dancing"]


def test_words_beyond_the_length_are_ignored_and_said_to_be(encoder: WordTextEncoder) -> None:
    long = "red ball " * 6
    understood, ignored = encoder.understood(long)
    assert (len(understood), len(ignored)) == (8, 4)
    assert torch.equal(encoder.encode(long), encoder.encode("red ball " * 4))


def test_unknown_words_leave_no_trace(encoder: WordTextEncoder) -> None:
    plain = encoder.encode("a red ball")
    assert plain.shape == (1, 8, 16)
    assert torch.equal(plain, encoder.encode("please: one RED dancing ball"))


def test_order_and_meaning_reach_the_rows(encoder: WordTextEncoder) -> None:
    a = encoder.encode("red ball on a blue background")
    b = encoder.encode("blue ball on a red background")
    assert not torch.allclose(a, b, atol=1e-3)


def test_padding_fills_up_to_the_length() -> None:
    assert padded_ids("red", 3) == [IDS["red"], IDS[PADDING], IDS[PADDING]]


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"text\.heads: 3"):
        WordTextEncoder(WordTextShape(heads=3), 16, 8)
