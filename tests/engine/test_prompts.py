"""The book of encoded prompts: bounded, by latest use, rows cut and filled up again exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from echo_ray.engine.prompts import PromptBook, padded


class CountingEncoder:
    """Rows that tell prompts apart: as many of ones as the prompt has letters, then zeros."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, prompt: str) -> Tensor:
        self.asked.append(prompt)
        rows = torch.zeros(1, 6, 4)
        rows[:, : len(prompt)] = 1.0
        return rows

    def understood(self, prompt: str) -> tuple[list[str], list[str]]:
        return [prompt], []


def test_a_prompt_is_encoded_once_while_it_is_held() -> None:
    encoder = CountingEncoder()
    book = PromptBook(encoder, kept=2)
    for text in ("a", "bb", "a", "ccc", "a", "bb"):
        book.look_up(text)
    # "bb" was used longest ago when "ccc" came.
    assert encoder.asked == ["a", "bb", "ccc", "bb"]


@pytest.mark.parametrize("text", ["", "a", "four", "sixsix"])
def test_rows_are_cut_and_filled_up_to_the_same(text: str) -> None:
    encoder = CountingEncoder()
    prompt = PromptBook(encoder, kept=1).look_up(text)
    assert prompt.rows_BPE.shape[1] == max(1, len(text))
    assert torch.equal(padded(prompt, 6), encoder.encode(text))


def test_held_rows_do_not_hold_the_padding_alive() -> None:
    prompt = PromptBook(CountingEncoder(), kept=1).look_up("a")
    assert prompt.rows_BPE.untyped_storage().nbytes() == 4 * 4
