"""A causal convolution's input: norm over channels, gain and SiLU, behind the frames seen before.

The convolution needs its past and the new frames in one tensor. The kernel writes them there as it
computes them, and the newest two to where the next call finds its past: every number of the input
is read once, and nothing is laid together afterwards.

Shapes: B batch, C channels, T new frames, P frames of the past (2), H W size. The kernel works on
rows of channels (channels_last_3d); other layouts are copied into that one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from echo_kernels.dispatch import Op, expect
from echo_kernels.launch import block_of, kernel

if TYPE_CHECKING:
    import triton.language as tl

PAST = 2
LAST = torch.channels_last_3d
TILE = 2048
"""Numbers that a program holds of one frame."""


def check(x_BCTHW: Tensor, gain_C: Tensor, past_BCPHW: Tensor | None, kept_BCPHW: Tensor) -> None:
    if x_BCTHW.dim() != 5 or not x_BCTHW.shape[2]:
        raise ValueError(
            f"norm_silu_join: x is {list(x_BCTHW.shape)}; give [B, C, T, H, W], T >= 1"
        )
    size = list(x_BCTHW.shape)
    size[2] = PAST
    expect("norm_silu_join", "gain", gain_C, size[1:2])
    expect("norm_silu_join", "kept", kept_BCPHW, size)
    if past_BCPHW is not None:
        expect("norm_silu_join", "past", past_BCPHW, size)


def truth(x_BCTHW: Tensor, gain_C: Tensor, past_BCPHW: Tensor | None, kept_BCPHW: Tensor) -> Tensor:
    """[B, C, P + T, H, W]: the past (zeros without one), then silu(x / |x| * sqrt(C) * gain).

    Its last two frames go to `kept` as well, which may be `past` itself.
    """
    unit = functional.normalize(x_BCTHW, dim=1)
    new = functional.silu(unit * x_BCTHW.shape[1] ** 0.5 * gain_C.view(-1, 1, 1, 1))
    size = list(x_BCTHW.shape)
    size[2] += PAST
    lies_last = kept_BCPHW.is_contiguous(memory_format=LAST) and not kept_BCPHW.is_contiguous()
    layout = LAST if lies_last else torch.contiguous_format
    joined = torch.empty(size, dtype=new.dtype, device=new.device, memory_format=layout)
    joined[:, :, :PAST] = 0 if past_BCPHW is None else past_BCPHW
    joined[:, :, PAST:] = new
    kept_BCPHW.copy_(joined[:, :, -PAST:])
    return joined


@kernel
def norm_silu_join_kernel(
    x: tl.tensor,
    gain: tl.tensor,
    past: tl.tensor,
    kept: tl.tensor,
    joined: tl.tensor,
    places: tl.tensor,
    channels: tl.tensor,
    root: tl.tensor,
    HAS_PAST: tl.constexpr,
    FRAMES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program takes some places of the picture through all frames."""
    kind = joined.dtype.element_ty
    batch = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    real = (place < places) & (channel < channels)
    at = place * channels + channel
    size = tl.full([], 1, tl.int64) * places * channels
    into = joined + batch * (FRAMES + 2) * size + at
    keep = kept + batch * 2 * size + at
    older = tl.zeros([ROWS, BLOCK], dtype=kind)
    newer = older
    if HAS_PAST:
        seen = past + batch * 2 * size + at
        older = tl.load(seen, mask=real)
        newer = tl.load(seen + size, mask=real)
        # `kept` may be `past`: all of it has to be read before any of it is written.
        tl.debug_barrier()
    tl.store(into, older, mask=real)
    tl.store(into + size, newer, mask=real)
    if FRAMES == 1:
        tl.store(keep, newer, mask=real)
    weight = tl.load(gain + channel, mask=channel < channels, other=0.0).to(tl.float32)
    for t in range(FRAMES):
        frame = x + (batch * FRAMES + t) * size + at
        wide = tl.load(frame, mask=real, other=0.0).to(tl.float32)
        length = tl.sqrt_rn(tl.sum(wide * wide, axis=1))
        length = tl.maximum(length, 1e-12).to(kind).to(tl.float32)
        unit = (wide / length[:, None]).to(kind).to(tl.float32)
        unit = (unit * root).to(kind).to(tl.float32)
        gained = (unit * weight).to(kind).to(tl.float32)
        new = (gained / (1.0 + tl.exp(-gained))).to(kind)
        tl.store(into + (2 + t) * size, new, mask=real)
        tl.store(keep + (t + 2 - FRAMES) * size, new, mask=real & (t >= FRAMES - 2))


def run(x_BCTHW: Tensor, gain_C: Tensor, past_BCPHW: Tensor | None, kept_BCPHW: Tensor) -> Tensor:
    x = x_BCTHW.contiguous(memory_format=LAST)
    past = x if past_BCPHW is None else past_BCPHW.contiguous(memory_format=LAST)
    kept = kept_BCPHW
    if not kept.is_contiguous(memory_format=LAST):
        kept = torch.empty_like(kept, memory_format=LAST)
    batch, channels, frames, height, width = x.shape
    size = (batch, channels, PAST + frames, height, width)
    joined = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=LAST)
    block, places = block_of(channels), height * width
    rows = max(1, TILE // block)
    norm_silu_join_kernel.launch(
        (-(-places // rows), batch),
        x, gain_C.contiguous(), past, kept, joined, places, channels, channels**0.5,
        HAS_PAST=past_BCPHW is not None, FRAMES=frames, ROWS=rows, BLOCK=block,
    )  # fmt: skip
    if kept is not kept_BCPHW:
        kept_BCPHW.copy_(kept)
    return joined


norm_silu_join = Op("norm_silu_join", check, truth, run)
