"""Encoded prompts, held for whoever asks for the same one again.

Shapes: P rows that are not zero at the end, L text_len, E text width.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor
from torch.nn import functional

from echo_ray.engine.state import Prompt
from echo_ray.model.text import TextEncoder


class PromptBook:
    """The latest `kept` prompts with their rows; the one used longest ago goes first."""

    def __init__(self, encoder: TextEncoder, kept: int) -> None:
        self._encoder = encoder
        self._kept = kept
        self._prompts: OrderedDict[str, Prompt] = OrderedDict()

    def look_up(self, text: str) -> Prompt:
        """The prompt encoded; the encoder runs only if it is not in the book."""
        prompt = self._prompts.pop(text, None) or Prompt(text, _cut(self._encoder.encode(text)))
        self._prompts[text] = prompt
        if len(self._prompts) > self._kept:
            self._prompts.popitem(last=False)
        return prompt


def padded(prompt: Prompt, length: int) -> Tensor:
    """Rows [1, L, E] of a prompt, filled up with zeros."""
    return functional.pad(prompt.rows_BPE, (0, 0, 0, length - prompt.rows_BPE.shape[1]))


def _cut(rows_BLE: Tensor) -> Tensor:
    """Without the rows at the end that are zero; at least one stays."""
    used = rows_BLE.ne(0).any(dim=-1)[0].nonzero()
    return rows_BLE[:, : int(used.max()) + 1 if len(used) else 1].clone()
