"""LayerNorm without parameters, then scale and shift of each token's frame.

Shapes: B batch, F frames, T tokens per frame, N = F * T tokens, C width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from echo_kernels.device import layer_norm, store_row8
from echo_kernels.dispatch import Op, expect
from echo_kernels.launch import block_of, kernel, rows_of
from echo_kernels.rows8 import Rows8, empty_rows8
from echo_kernels.rows8 import truth as in_rows8

if TYPE_CHECKING:
    import triton.language as tl


def check(x_BNC: Tensor, shift_BFC: Tensor, scale_BFC: Tensor, eps: float) -> None:
    check_frames("layernorm_modulate", "shift", x_BNC, shift_BFC)
    expect("layernorm_modulate", "scale", scale_BFC, shift_BFC.shape)


def check_frames(op: str, name: str, x_BNC: Tensor, part_BFC: Tensor) -> None:
    """Raise `ValueError` unless `part` has one row for each of a whole number of frames."""
    frames = part_BFC.shape[1] if part_BFC.dim() == 3 else 1
    if x_BNC.dim() != 3 or not frames or x_BNC.shape[1] % frames:
        raise ValueError(
            f"{op}: x is {list(x_BNC.shape)}, {name} {list(part_BFC.shape)}; give [B, N, C] "
            "and [B, F, C] with N a multiple of F"
        )
    expect(op, name, part_BFC, (x_BNC.shape[0], frames, x_BNC.shape[2]))


def split_frames(x_BNC: Tensor, frames: int) -> Tensor:
    return x_BNC.view(x_BNC.shape[0], frames, -1, x_BNC.shape[-1])


def truth(x_BNC: Tensor, shift_BFC: Tensor, scale_BFC: Tensor, eps: float) -> Tensor:
    frames = shift_BFC.shape[1]
    h_BFTC = split_frames(functional.layer_norm(x_BNC, x_BNC.shape[-1:], eps=eps), frames)
    return (h_BFTC * (1 + scale_BFC.unsqueeze(2)) + shift_BFC.unsqueeze(2)).flatten(1, 2)


def truth8(x_BNC: Tensor, shift_BFC: Tensor, scale_BFC: Tensor, eps: float) -> Rows8:
    return in_rows8(truth(x_BNC, shift_BFC, scale_BFC, eps))


@kernel
def layernorm_modulate_kernel(
    x: tl.tensor, shift: tl.tensor, scale: tl.tensor, out: tl.tensor, scales: tl.tensor,
    tokens: tl.tensor, per_frame: tl.tensor, channels: tl.tensor,
    shift_b: tl.tensor, shift_f: tl.tensor, scale_b: tl.tensor, scale_f: tl.tensor,
    eps: tl.tensor, EIGHT: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch = row // tokens
    frame = row % tokens // per_frame
    at = tl.arange(0, BLOCK)
    real = at < channels
    kind = x.dtype.element_ty
    wide = tl.load(x + row * channels + at, mask=real, other=0.0).to(tl.float32)
    normed = layer_norm(wide, real, channels, eps).to(kind).to(tl.float32)
    factor = tl.load(scale + batch * scale_b + frame * scale_f + at, mask=real, other=0.0)
    factor = (1.0 + factor.to(tl.float32)).to(kind).to(tl.float32)
    offset = tl.load(shift + batch * shift_b + frame * shift_f + at, mask=real, other=0.0)
    scaled = (normed * factor).to(kind).to(tl.float32)
    result = (scaled + offset.to(tl.float32)).to(kind)
    if EIGHT:
        store_row8(out, scales, row, result.to(tl.float32), at, real, channels)
    else:
        tl.store(out + row * channels + at, result, mask=real)


def launch(
    x_BNC: Tensor, shift_BFC: Tensor, scale_BFC: Tensor, eps: float, into: Rows8 | None
) -> Tensor:
    x_BNC, shift, scale = x_BNC.contiguous(), rows_of(shift_BFC), rows_of(scale_BFC)
    batch, tokens, channels = x_BNC.shape
    # Scales are never written without 8 bits; Triton wants some pointer.
    out, scales = into or (torch.empty_like(x_BNC), x_BNC)
    layernorm_modulate_kernel.launch(
        (batch * tokens,),
        x_BNC, shift, scale, out, scales,
        tokens, tokens // shift.shape[1], channels,
        *shift.stride()[:2], *scale.stride()[:2],
        eps, EIGHT=into is not None, BLOCK=block_of(channels),
    )  # fmt: skip
    return out


def run(x_BNC: Tensor, shift_BFC: Tensor, scale_BFC: Tensor, eps: float) -> Tensor:
    return launch(x_BNC, shift_BFC, scale_BFC, eps, None)


def run8(x_BNC: Tensor, shift_BFC: Tensor, scale_BFC: Tensor, eps: float) -> Rows8:
    found = empty_rows8(x_BNC)
    launch(x_BNC, shift_BFC, scale_BFC, eps, found)
    return found


layernorm_modulate = Op("layernorm_modulate", check, truth, run)
layernorm_modulate8 = Op("layernorm_modulate8", check, truth8, run8)
