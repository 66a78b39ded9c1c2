"""Queries, keys or values in 8 bits, with a fixed scale for each head.

A scale does not depend on what it scales, so a key that is rounded is the same whenever it is.
Scales are powers of two: dividing by one rounds nothing.

Shapes: B batch, N tokens, H heads, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from echo_kernels.dispatch import Op, expect
from echo_kernels.launch import block_of, kernel
from echo_kernels.rotate import check_slots
from echo_kernels.rows8 import E4M3, LARGEST

if TYPE_CHECKING:
    import triton.language as tl


def check(x_BNHD: Tensor, scales_H: Tensor) -> None:
    if x_BNHD.dim() != 4 or scales_H.dtype is not torch.float32:
        raise ValueError(
            f"heads8: x is {list(x_BNHD.shape)}, scales are {scales_H.dtype}; give [B, N, H, D] "
            "and float32"
        )
    expect("heads8", "scales", scales_H, x_BNHD.shape[2:3])
    check_slots("heads8", "x", x_BNHD)


def truth(x_BNHD: Tensor, scales_H: Tensor) -> Tensor:
    """e4m3; what lies beyond its largest number becomes that."""
    return (x_BNHD.float() / scales_H[:, None]).clamp(-LARGEST, LARGEST).to(E4M3)


@kernel
def heads8_kernel(
    x: tl.tensor, scales: tl.tensor, out: tl.tensor,
    tokens: tl.tensor, channels: tl.tensor, size: tl.tensor, x_b: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    real = at < channels
    begin = x + row // tokens * x_b + row % tokens * channels
    wide = tl.load(begin + at, mask=real, other=0.0).to(tl.float32)
    wide = tl.div_rn(wide, tl.load(scales + at // size, mask=real, other=1.0))
    wide = tl.clamp(wide, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + row * channels + at, wide.to(out.dtype.element_ty), mask=real)


def run(x_BNHD: Tensor, scales_H: Tensor) -> Tensor:
    batch, tokens, heads, size = x_BNHD.shape
    out = torch.empty(x_BNHD.shape, dtype=E4M3, device=x_BNHD.device)
    heads8_kernel.launch(
        (batch * tokens,),
        x_BNHD, scales_H.contiguous(), out,
        tokens, heads * size, size, x_BNHD.stride(0), BLOCK=block_of(heads * size),
    )  # fmt: skip
    return out


heads8 = Op("heads8", check, truth, run, mixed=True)
