"""Linear layers in 8 bits, and the ops that give them their input.

Shapes: C input width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from echo_kernels import (
    Rows8,
    gelu_rows8,
    layernorm_modulate,
    layernorm_modulate8,
    linear8,
    residual_layernorm,
    residual_layernorm8,
    residual_modulate,
    residual_modulate8,
    rows8,
)

Activation = Tensor | Rows8
"""What a linear layer takes: numbers, or the same in 8 bits where its precision is that."""


@dataclass(frozen=True, slots=True)
class Producers:
    """The ops before a block's linear layers, with results of the kind that those take."""

    layernorm_modulate: Callable[..., Any]
    residual_modulate: Callable[..., tuple[Tensor, Any]]
    residual_layernorm: Callable[..., tuple[Tensor, Any]]


EXACT = Producers(layernorm_modulate, residual_modulate, residual_layernorm)
EIGHT = Producers(layernorm_modulate8, residual_modulate8, residual_layernorm8)


class Linear8(nn.Module):
    """A linear layer whose weight was rounded once, a scale for each output.

    Its input comes in 8 bits from the op before, or is rounded here, a scale for each token.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.kind = linear.weight.dtype
        values, scales = rows8(linear.weight)
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", linear.bias)

    def forward(self, x_C: Activation) -> Tensor:
        rows = x_C if isinstance(x_C, Rows8) else rows8(x_C)
        weight = Rows8(self.get_buffer("values"), self.get_buffer("scales"))
        return linear8(rows, weight, self.get_buffer("bias"), self.kind)


class Gelu8(nn.Module):
    """GELU whose result is in 8 bits."""

    def forward(self, x_C: Tensor) -> Rows8:
        return gelu_rows8(x_C)
