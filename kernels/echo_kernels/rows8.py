"""Rows in 8 bits, as products on tensor cores take them: e4m3 numbers and a scale for each row.

A row's largest number becomes the largest of e4m3. Numbers are rounded to their own kind before,
so a fused op gives what its exact form and `rows8` would give one after the other.

Shapes: C width; any axes before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from echo_kernels.device import store_row8
from echo_kernels.dispatch import FLOATS, Op
from echo_kernels.launch import block_of, kernel

if TYPE_CHECKING:
    import triton.language as tl

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of e4m3."""
LEAST = 1e-12
"""A row of nothing has some scale, too."""

WIDE = 4096
"""Longer rows take every register that four warps have."""


class Rows8(NamedTuple):
    """What a number is: its value times its row's scale."""

    values: Tensor
    """e4m3 [..., C]"""
    scales: Tensor
    """float32 [..., 1]"""


def check(x_C: Tensor) -> None:
    check_kind("rows8", x_C)


def check_gelu(x_C: Tensor) -> None:
    check_kind("gelu_rows8", x_C)


def check_kind(op: str, x_C: Tensor) -> None:
    if x_C.dtype not in FLOATS or not x_C.dim():
        known = ", ".join(str(kind).removeprefix("torch.") for kind in FLOATS)
        raise ValueError(f"{op}: x is {list(x_C.shape)} of {x_C.dtype}; give [..., C] of {known}")


def truth(x_C: Tensor) -> Rows8:
    wide = x_C.float()
    scales = wide.abs().amax(dim=-1, keepdim=True).clamp(min=LEAST) / LARGEST
    return Rows8((wide / scales).to(E4M3), scales)


def gelu_truth(x_C: Tensor) -> Rows8:
    """GELU in its form with a tanh, then `rows8`."""
    return truth(functional.gelu(x_C, approximate="tanh"))


@kernel
def rows8_kernel(
    x: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    channels: tl.tensor,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    real = at < channels
    wide = tl.load(x + row * channels + at, mask=real, other=0.0).to(tl.float32)
    if GELU:
        # x / 2 (1 + tanh u) is x times the sigmoid of 2 u.
        twice = 1.5957691216057308 * (wide + 0.044715 * wide * wide * wide)
        wide = (wide / (1.0 + tl.exp(-twice))).to(x.dtype.element_ty).to(tl.float32)
    store_row8(out, scales, row, wide, at, real, channels)


def run(x_C: Tensor) -> Rows8:
    return launch(x_C, has_gelu=False)


def run_gelu(x_C: Tensor) -> Rows8:
    return launch(x_C, has_gelu=True)


def launch(x_C: Tensor, *, has_gelu: bool) -> Rows8:
    x_C, channels = x_C.contiguous(), x_C.shape[-1]
    found = empty_rows8(x_C)
    rows8_kernel.launch(
        (found.scales.numel(),),
        x_C, found.values, found.scales, channels, GELU=has_gelu, BLOCK=block_of(channels),
        num_warps=8 if channels > WIDE else 4,
    )  # fmt: skip
    return found


def empty_rows8(x_C: Tensor) -> Rows8:
    """Room for the rows of a tensor."""
    values = torch.empty(x_C.shape, dtype=E4M3, device=x_C.device)
    return Rows8(values, values.new_empty((*x_C.shape[:-1], 1), dtype=torch.float32))


rows8 = Op("rows8", check, truth, run)
gelu_rows8 = Op("gelu_rows8", check_gelu, gelu_truth, run_gelu)
