"""RMSNorm over the full width: of the queries of cross-attention, and wherever else one stands.

Shapes: C width; any axes before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from echo_kernels.device import over_rms
from echo_kernels.dispatch import Op, expect
from echo_kernels.launch import block_of, kernel

if TYPE_CHECKING:
    import triton.language as tl


def check(x_C: Tensor, weight_C: Tensor, eps: float) -> None:
    expect("rms_norm", "weight", weight_C, x_C.shape[-1:])


def truth(x_C: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """x / rms(x), computed in float32 and cast back before the weight is applied."""
    wide = x_C.float()
    scale = torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (wide * scale).to(x_C.dtype) * weight_C


@kernel
def rms_norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    channels: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * channels
    at = tl.arange(0, BLOCK)
    real = at < channels
    wide = tl.load(x + row + at, mask=real, other=0.0).to(tl.float32)
    scale = over_rms(tl.sum(wide * wide, axis=0), channels, eps)
    rounded = (wide * scale).to(out.dtype.element_ty).to(tl.float32)
    product = rounded * tl.load(weight + at, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row + at, product.to(out.dtype.element_ty), mask=real)


def run(x_C: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    x_C, channels = x_C.contiguous(), x_C.shape[-1]
    out = torch.empty_like(x_C)
    rms_norm_kernel.launch(
        (x_C.numel() // channels,),
        x_C, weight_C.contiguous(), out, channels, eps, BLOCK=block_of(channels),
    )  # fmt: skip
    return out


rms_norm = Op("rms_norm", check, truth, run)
