"""What a branch gives back to the stream, and the norm that the next branch begins with.

Shapes: B batch, F frames, N tokens, C width. A gate is per frame; without one the branch is added
as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from echo_kernels.device import layer_norm, store_row8
from echo_kernels.dispatch import Op, expect
from echo_kernels.launch import block_of, kernel, rows_of
from echo_kernels.layernorm_modulate import check_frames, split_frames
from echo_kernels.layernorm_modulate import truth as modulated
from echo_kernels.rows8 import Rows8, empty_rows8
from echo_kernels.rows8 import truth as in_rows8

if TYPE_CHECKING:
    import triton.language as tl


def gated(y_BNC: Tensor, gate_BFC: Tensor) -> Tensor:
    """Every token times its frame's gate."""
    frames = gate_BFC.shape[1]
    return (split_frames(y_BNC, frames) * gate_BFC.unsqueeze(2)).flatten(1, 2)


def residual(x_BNC: Tensor, y_BNC: Tensor, gate_BFC: Tensor | None) -> Tensor:
    return x_BNC + (y_BNC if gate_BFC is None else gated(y_BNC, gate_BFC))


def check_residual(op: str, x_BNC: Tensor, y_BNC: Tensor, gate_BFC: Tensor | None) -> None:
    expect(op, "y", y_BNC, x_BNC.shape)
    if gate_BFC is not None:
        check_frames(op, "gate", x_BNC, gate_BFC)


def check_modulate(
    x_BNC: Tensor,
    y_BNC: Tensor,
    gate_BFC: Tensor | None,
    shift_BFC: Tensor,
    scale_BFC: Tensor,
    eps: float,
) -> None:
    check_residual("residual_modulate", x_BNC, y_BNC, gate_BFC)
    check_frames("residual_modulate", "shift", x_BNC, shift_BFC)
    expect("residual_modulate", "scale", scale_BFC, shift_BFC.shape)


def modulate_truth(
    x_BNC: Tensor,
    y_BNC: Tensor,
    gate_BFC: Tensor | None,
    shift_BFC: Tensor,
    scale_BFC: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """x + gate * y, and its LayerNorm with scale and shift of each token's frame."""
    x_BNC = residual(x_BNC, y_BNC, gate_BFC)
    return x_BNC, modulated(x_BNC, shift_BFC, scale_BFC, eps)


def check_layernorm(
    x_BNC: Tensor,
    y_BNC: Tensor,
    gate_BFC: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    eps: float,
) -> None:
    check_residual("residual_layernorm", x_BNC, y_BNC, gate_BFC)
    expect("residual_layernorm", "weight", weight_C, x_BNC.shape[-1:])
    expect("residual_layernorm", "bias", bias_C, x_BNC.shape[-1:])


def layernorm_truth(
    x_BNC: Tensor,
    y_BNC: Tensor,
    gate_BFC: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """x + gate * y, and its LayerNorm with weight and bias, which round once."""
    x_BNC = residual(x_BNC, y_BNC, gate_BFC)
    return x_BNC, functional.layer_norm(x_BNC, x_BNC.shape[-1:], weight_C, bias_C, eps)


def modulate8_truth(
    x_BNC: Tensor,
    y_BNC: Tensor,
    gate_BFC: Tensor | None,
    shift_BFC: Tensor,
    scale_BFC: Tensor,
    eps: float,
) -> tuple[Tensor, Rows8]:
    x_BNC, h_BNC = modulate_truth(x_BNC, y_BNC, gate_BFC, shift_BFC, scale_BFC, eps)
    return x_BNC, in_rows8(h_BNC)


def layernorm8_truth(
    x_BNC: Tensor,
    y_BNC: Tensor,
    gate_BFC: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    eps: float,
) -> tuple[Tensor, Rows8]:
    x_BNC, h_BNC = layernorm_truth(x_BNC, y_BNC, gate_BFC, weight_C, bias_C, eps)
    return x_BNC, in_rows8(h_BNC)


@kernel
def residual_norm_kernel(
    x: tl.tensor, y: tl.tensor, gate: tl.tensor, scale: tl.tensor, shift: tl.tensor,
    stream: tl.tensor, out: tl.tensor, scales: tl.tensor,
    tokens: tl.tensor, gate_frame: tl.tensor, norm_frame: tl.tensor, channels: tl.tensor,
    gate_b: tl.tensor, gate_f: tl.tensor, scale_b: tl.tensor, scale_f: tl.tensor,
    shift_b: tl.tensor, shift_f: tl.tensor,
    eps: tl.tensor, GATED: tl.constexpr, MODULATED: tl.constexpr, EIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch = row // tokens
    token = row % tokens
    at = tl.arange(0, BLOCK)
    real = at < channels
    kind = x.dtype.element_ty
    branch = tl.load(y + row * channels + at, mask=real, other=0.0).to(tl.float32)
    if GATED:
        place = batch * gate_b + token // gate_frame * gate_f
        factor = tl.load(gate + place + at, mask=real, other=0.0).to(tl.float32)
        branch = (branch * factor).to(kind).to(tl.float32)
    before = tl.load(x + row * channels + at, mask=real, other=0.0).to(tl.float32)
    after = (before + branch).to(kind)
    tl.store(stream + row * channels + at, after, mask=real)
    normed = layer_norm(after.to(tl.float32), real, channels, eps)
    frame = token // norm_frame
    factor = tl.load(scale + batch * scale_b + frame * scale_f + at, mask=real, other=0.0)
    factor = factor.to(tl.float32)
    if MODULATED:
        factor = (1.0 + factor).to(kind).to(tl.float32)
        normed = (normed.to(kind).to(tl.float32) * factor).to(kind).to(tl.float32)
    else:
        normed = normed * factor
    offset = tl.load(shift + batch * shift_b + frame * shift_f + at, mask=real, other=0.0)
    result = (normed + offset.to(tl.float32)).to(kind)
    if EIGHT:
        store_row8(out, scales, row, result.to(tl.float32), at, real, channels)
    else:
        tl.store(out + row * channels + at, result, mask=real)


def launch(
    x_BNC: Tensor,
    y_BNC: Tensor,
    gate_BFC: Tensor | None,
    shift_BFC: Tensor,
    scale_BFC: Tensor,
    eps: float,
    into: Rows8 | None,
    *,
    is_modulated: bool,
) -> tuple[Tensor, Tensor]:
    x, y, shift, scale = x_BNC.contiguous(), y_BNC.contiguous(), rows_of(shift_BFC), scale_BFC
    scale = rows_of(scale)
    # Never read without a gate, and scales never written without 8 bits; Triton wants a pointer.
    gate = shift if gate_BFC is None else rows_of(gate_BFC)
    batch, tokens, channels = x.shape
    stream = torch.empty_like(x)
    out, scales = into or (torch.empty_like(x), x)
    residual_norm_kernel.launch(
        (batch * tokens,),
        x, y, gate, scale, shift, stream, out, scales,
        tokens, tokens // gate.shape[1], tokens // shift.shape[1], channels,
        *gate.stride()[:2], *scale.stride()[:2], *shift.stride()[:2],
        eps, GATED=gate_BFC is not None, MODULATED=is_modulated, EIGHT=into is not None,
        BLOCK=block_of(channels),
    )  # fmt: skip
    return stream, out


def run_modulate(
    x_BNC: Tensor,
    y_BNC: Tensor,
    gate_BFC: Tensor | None,
    shift_BFC: Tensor,
    scale_BFC: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return launch(x_BNC, y_BNC, gate_BFC, shift_BFC, scale_BFC, eps, None, is_modulated=True)


def run_modulate8(
    x_BNC: Tensor,
    y_BNC: Tensor,
    gate_BFC: Tensor | None,
    shift_BFC: Tensor,
    scale_BFC: Tensor,
    eps: float,
) -> tuple[Tensor, Rows8]:
    into = empty_rows8(x_BNC)
    stream, _ = launch(x_BNC, y_BNC, gate_BFC, shift_BFC, scale_BFC, eps, into, is_modulated=True)
    return stream, into


def run_layernorm(
    x_BNC: Tensor,
    y_BNC: Tensor,
    gate_BFC: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    scale, shift = as_frames(x_BNC, weight_C, bias_C)
    return launch(x_BNC, y_BNC, gate_BFC, shift, scale, eps, None, is_modulated=False)


def run_layernorm8(
    x_BNC: Tensor,
    y_BNC: Tensor,
    gate_BFC: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    eps: float,
) -> tuple[Tensor, Rows8]:
    into, (scale, shift) = empty_rows8(x_BNC), as_frames(x_BNC, weight_C, bias_C)
    stream, _ = launch(x_BNC, y_BNC, gate_BFC, shift, scale, eps, into, is_modulated=False)
    return stream, into


def as_frames(x_BNC: Tensor, *parts_C: Tensor) -> list[Tensor]:
    """Vectors as they would be with one frame: [B, 1, C]."""
    return [part.expand(x_BNC.shape[0], 1, -1) for part in parts_C]


residual_modulate = Op("residual_modulate", check_modulate, modulate_truth, run_modulate)
residual_layernorm = Op("residual_layernorm", check_layernorm, layernorm_truth, run_layernorm)
residual_modulate8 = Op("residual_modulate8", check_modulate, modulate8_truth, run_modulate8)
residual_layernorm8 = Op("residual_layernorm8", check_layernorm, layernorm8_truth, run_layernorm8)
