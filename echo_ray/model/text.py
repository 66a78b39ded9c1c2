"""What every prompt encoder can do: a prompt to the rows that cross-attention reads."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class TextEncoder(Protocol):
    """Runs once per prompt; equal prompts give equal rows."""

    def encode(self, prompt: str) -> Tensor:
        """Rows [1, text_len, text_dim] of one prompt, in the model's dtype, on its device."""
        ...

    def understood(self, prompt: str) -> tuple[list[str], list[str]]:
        """The words that reach the model, and those that it ignores or that were cut off."""
        ...
