"""Prompts to ids: cleaning, the end of sequence, the length, and tokenizers that do not fit."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from tokenizers_small import build_tokenizer, write_tokenizer

from echo_ray.errors import ConfigError, WeightsError
from echo_ray.model.tokens import PromptTokenizer, clean

EVERY_CHARACTER = st.text(st.characters(exclude_categories=()), max_size=40)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def words(*ids: tuple[str, int], end: bool = True, unknown: str = "<unk>") -> Tokenizer:
    """A tokenizer of whole words with the given ids."""
    tokenizer = Tokenizer(models.WordLevel(dict(ids), unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", dict(ids)["</s>"])]
        )
    return tokenizer


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  A red\t\tBall,\n\n moving!  ", "A red Ball, moving!"),
        ("a &lt;ball&gt;", "a <ball>"),
        ("a <b> &amp;amp;lt; c", "a <b> &lt; c"),
        ("schÃ¶n", "schön"),
        ("\u2018quoted\u2019", "'quoted'"),
        ("a&nbsp;ball", "a ball"),
        ("a\u3000\u2003ball", "a ball"),
        ("&#x41;\x00\x07 \x1b[31mred", "A red"),
        ("\ud83d\ude00 \ud800 ball", "😀 \ufffd ball"),
        ("&#xD800; &#0; &#1114112;", "\ufffd \ufffd \ufffd"),
        ("&amp;#" + "9" * 5000 + "; ball", "\ufffd ball"),
        (" \n\t ", ""),
        ("", ""),
    ],
)
def test_prompts_are_cleaned_as_the_encoder_s_training_did(prompt: str, cleaned: str) -> None:
    assert clean(prompt) == cleaned


@given(EVERY_CHARACTER)
def test_any_string_can_be_cleaned(prompt: str) -> None:
    cleaned = clean(prompt)
    cleaned.encode("utf-8")
    assert cleaned == " ".join(cleaned.split())


def test_ids_end_with_the_end_and_are_padded(folder: Path) -> None:
    tokenizer = PromptTokenizer.from_folder(folder, 8, 64)
    vocabulary = build_tokenizer().get_vocab()
    expected = [vocabulary[f"▁{word}"] for word in ("a", "red", "ball")]
    assert tokenizer(" a  red ball\n") == ([*expected, 1, 0, 0, 0, 0], [1] * 4 + [0] * 4)


def test_no_letter_is_lowered(folder: Path) -> None:
    tokenizer = PromptTokenizer.from_folder(folder, 8, 64)
    assert tokenizer("red") != tokenizer("Red")
    assert 2 in tokenizer("Red")[0]


def test_an_empty_prompt_is_the_end_alone(folder: Path) -> None:
    tokenizer = PromptTokenizer.from_folder(folder, 4, 64)
    for prompt in ("", " ", "\x00"):
        assert tokenizer(prompt) == ([1, 0, 0, 0], [1, 0, 0, 0])
        assert tokenizer.understood(prompt) == ([], [])


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 20])
def test_truncation_is_the_library_s_own(folder: Path, length: int) -> None:
    reference = build_tokenizer()
    reference.enable_truncation(length)
    reference.enable_padding(length=length, pad_id=0, pad_token="<pad>")
    tokenizer = PromptTokenizer.from_folder(folder, length, 64)
    for prompt in ("a red ball", "a red ball on", "the big moving ball on black", "x" * 50, ""):
        encoding = reference.encode(prompt)
        assert tokenizer(prompt) == (encoding.ids, encoding.attention_mask)
        assert tokenizer(prompt)[0][sum(encoding.attention_mask) - 1] == 1


def test_settings_in_the_file_do_not_count(tmp_path: Path) -> None:
    foreign = build_tokenizer()
    foreign.enable_truncation(3, direction="left")
    foreign.enable_padding(length=5, direction="left", pad_id=0)
    own = PromptTokenizer(build_tokenizer(), 8)("the big red ball on black")
    read = PromptTokenizer.from_folder(save(foreign, tmp_path), 8, 64)
    assert read("the big red ball on black") == own
    assert PromptTokenizer(foreign, 8)("the big red ball on black") == own


@pytest.mark.parametrize(
    ("length", "kept", "cut"),
    [
        (8, ["a", "red", "axe", "ball"], []),
        (7, ["a", "red", "axe", "ball"], []),
        (6, ["a", "red", "axe"], ["ball"]),
        (5, ["a", "red"], ["axe", "ball"]),
        (4, ["a", "red"], ["axe", "ball"]),
        (3, ["a", "red"], ["axe", "ball"]),
        (2, ["a"], ["red", "axe", "ball"]),
    ],
)
def test_words_beyond_the_length_are_named(
    folder: Path, length: int, kept: list[str], cut: list[str]
) -> None:
    tokenizer = PromptTokenizer.from_folder(folder, length, 64)
    assert build_tokenizer().encode("axe").tokens == ["▁a", "x", "e", "</s>"]
    assert tokenizer.understood("a red axe  ball") == (kept, cut)


def test_a_repeated_word_can_be_whole_and_cut_off(folder: Path) -> None:
    tokenizer = PromptTokenizer.from_folder(folder, 4, 64)
    assert tokenizer.understood("ball red ball ball a") == (["ball", "red", "ball"], ["ball", "a"])


def test_special_tokens_written_out_are_taken_as_published(folder: Path) -> None:
    tokenizer = PromptTokenizer.from_folder(folder, 6, 64)
    ids, mask = tokenizer("red </s> &lt;pad&gt;")
    assert ids[sum(mask) - 1] == 1
    assert sum(mask) > 2


@given(EVERY_CHARACTER)
def test_any_string_gives_ids_of_the_vocabulary(prompt: str) -> None:
    tokenizer = PromptTokenizer(build_tokenizer(), 12)
    ids, mask = tokenizer(prompt)
    count = sum(mask)
    assert len(ids) == len(mask) == 12
    assert mask == [1] * count + [0] * (12 - count)
    assert ids[count - 1] == 1
    assert ids[count:] == [0] * (12 - count)
    assert all(0 <= i < 64 for i in ids)
    kept, cut = tokenizer.understood(prompt)
    assert kept + cut == clean(prompt).split()


@pytest.mark.parametrize(
    "piece",
    ["a", "x ", "a red ball ", "😀", "\n", "\u0301\u0316", "Ì\x81Ì\x96", "&amp;", "\ud800", "</s>"],
)
def test_very_long_prompts_take_bounded_time(folder: Path, piece: str) -> None:
    tokenizer = PromptTokenizer.from_folder(folder, 512, 64)
    prompt = (piece * 100_000)[:100_000]
    began = time.process_time()
    ids, mask = tokenizer(prompt)
    assert time.process_time() - began < 5
    assert len(ids) == len(mask) == 512


def test_a_length_without_room_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"dit\.text_len: 1 is not allowed: at least 2"):
        PromptTokenizer.from_folder(folder, 1, 64)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(WeightsError, match=r"no tokenizer: tokenizer\.json.*google/umt5-xxl"):
            PromptTokenizer.from_folder(folder, 8, 64)


@pytest.mark.parametrize("cut", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(folder: Path, cut: float) -> None:
    file = folder / "tokenizer.json"
    raw = file.read_bytes()
    file.write_bytes(raw[: int(cut * len(raw))])
    with pytest.raises(WeightsError, match=r"cannot be read as a tokenizer.*copy it again"):
        PromptTokenizer.from_folder(folder, 8, 64)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{}", b"[1, 2]", b"null"])
def test_another_file_is_refused(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(WeightsError, match="cannot be read as a tokenizer"):
        PromptTokenizer.from_folder(folder, 8, 64)


def test_a_tokenizer_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 65)
    with pytest.raises(WeightsError, match="65 tokens with ids up to 64, the encoder ids up to 63"):
        PromptTokenizer.from_folder(tmp_path, 8, 64)


def test_one_id_far_out_is_refused(tmp_path: Path) -> None:
    tokenizer = words(("<pad>", 0), ("</s>", 1), ("<unk>", 2), ("ball", 640))
    with pytest.raises(WeightsError, match="4 tokens with ids up to 640"):
        PromptTokenizer.from_folder(save(tokenizer, tmp_path), 8, 64)


def test_added_tokens_count(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(64)
    tokenizer.add_tokens([AddedToken("<more>")])
    with pytest.raises(WeightsError, match="65 tokens"):
        PromptTokenizer.from_folder(save(tokenizer, tmp_path), 8, 64)


def test_a_tokenizer_of_a_smaller_model_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 872)
    PromptTokenizer.from_folder(tmp_path, 8, 1000)
    with pytest.raises(WeightsError, match="872 tokens, the encoder 1001"):
        PromptTokenizer.from_folder(tmp_path, 8, 1001)


def test_another_padding_is_refused(tmp_path: Path) -> None:
    tokenizer = words(("<unk>", 0), ("</s>", 1), ("<pad>", 2))
    with pytest.raises(WeightsError, match="its padding has the id 2, the encoder's is 0"):
        PromptTokenizer.from_folder(save(tokenizer, tmp_path), 8, 64)
    tokenizer = build_tokenizer()
    tokenizer.enable_padding(pad_id=3, pad_token="▁")
    with pytest.raises(WeightsError, match="its padding has the id 3, the encoder's is 0"):
        PromptTokenizer.from_folder(save(tokenizer, tmp_path), 8, 64)


@pytest.mark.parametrize(
    "tokenizer",
    [
        words(("<pad>", 0), ("</s>", 1), ("<unk>", 2), end=False),
        words(("<pad>", 0), ("</s>", 2), ("<unk>", 1)),
    ],
)
def test_another_end_of_sequence_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="the end of sequence, 1"):
        PromptTokenizer.from_folder(save(tokenizer, tmp_path), 8, 64)


def test_a_beginning_of_sequence_is_refused(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A </s>", special_tokens=[("<unk>", 2), ("</s>", 1)]
    )
    with pytest.raises(WeightsError, match="does not fit the model: it encodes ''"):
        PromptTokenizer.from_folder(save(tokenizer, tmp_path), 8, 64)


def test_a_tokenizer_without_unknown_token_is_refused(tmp_path: Path) -> None:
    tokenizer = words(("<pad>", 0), ("</s>", 1), unknown="<none>")
    with pytest.raises(WeightsError, match="it cannot encode"):
        PromptTokenizer.from_folder(save(tokenizer, tmp_path), 8, 64)


@pytest.mark.parametrize("vocab", [4, 20, 64, 300])
def test_the_small_tokenizer_has_the_size_asked_for(tmp_path: Path, vocab: int) -> None:
    write_tokenizer(tmp_path / "deeper" / "tokenizer", vocab)
    written: dict[str, Any] = json.loads(
        (tmp_path / "deeper" / "tokenizer" / "tokenizer.json").read_text()
    )
    assert len(written["model"]["vocab"]) == vocab
    PromptTokenizer.from_folder(tmp_path / "deeper" / "tokenizer", 8, vocab)
