"""Decoded frames as bytes: planes of numbers from 0 to 1 to rows of pixels.

Shapes: N frames, K colours, H W size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from echo_kernels.dispatch import Op
from echo_kernels.launch import kernel

if TYPE_CHECKING:
    import triton.language as tl

BLOCK = 1024


def check(video_NKHW: Tensor) -> None:
    if video_NKHW.dim() != 4:
        raise ValueError(f"frames_to_uint8: video is {list(video_NKHW.shape)}; give [N, K, H, W]")


def truth(video_NKHW: Tensor) -> Tensor:
    """uint8 [N, H, W, K]: 255 x rounded to the video's kind, then to the nearest, ties to even.

    What lies outside of 0 to 1 is not clamped; decoders do that.
    """
    return (video_NKHW.permute(0, 2, 3, 1) * 255.0).round().to(torch.uint8).contiguous()


@kernel
def frames_to_uint8_kernel(
    video: tl.tensor, out: tl.tensor, colours: tl.tensor, pixels: tl.tensor, BLOCK: tl.constexpr
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < pixels
    frame = tl.program_id(1).to(tl.int64) * pixels * colours
    kind = video.dtype.element_ty
    for colour in range(colours):
        plane = video + frame + colour * pixels
        level = tl.load(plane + at, mask=real, other=0.0).to(tl.float32) * 255.0
        level = level.to(kind).to(tl.float32)
        below = tl.floor(level)
        beyond = level - below
        odd = below - 2.0 * tl.floor(below * 0.5)
        up = (beyond > 0.5) | ((beyond == 0.5) & (odd == 1.0))
        rounded = below + tl.where(up, 1.0, 0.0)
        tl.store(out + frame + at * colours + colour, rounded.to(tl.int32).to(tl.uint8), mask=real)


def run(video_NKHW: Tensor) -> Tensor:
    video = video_NKHW.contiguous()
    frames, colours, height, width = video.shape
    out = torch.empty(frames, height, width, colours, dtype=torch.uint8, device=video.device)
    pixels = height * width
    frames_to_uint8_kernel.launch(
        (-(-pixels // BLOCK), frames), video, out, colours, pixels, BLOCK=BLOCK
    )
    return out


frames_to_uint8 = Op("frames_to_uint8", check, truth, run)
