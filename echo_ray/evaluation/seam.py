"""How visible a decoder's restart is.

A decoder that comes back knows only trailing latents. For several counts of them this decodes the
next chunk and compares it with the frames of the decoder that never stopped: PSNR of the seam, and
whether the rebuilt state is the live one bit for bit.

Shapes: B batch (1), F latent frames, C channels, h w latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from echo_ray.model.codec import Codec

COUNTS = (1, 3, 6, 9, 12, 16, 20, 24, 30, 36, 37, 38)
CHUNK = 3
SMOOTHNESS = 0.9
"""How much of a latent is its predecessor's."""


@dataclass(frozen=True, slots=True)
class Seam:
    """The first chunk after a restart from `latents` trailing latents."""

    latents: int
    psnr_db: float
    exact: bool
    """Whether frames and rebuilt state are those of the decoder that never stopped."""


def measure(codec: Codec, latents_BFChw: Tensor, counts: Sequence[int]) -> Iterator[Seam]:
    """A seam before the last chunk of `latents_BFChw`, for every count of trailing latents."""
    past, coming = latents_BFChw[:, :-CHUNK], latents_BFChw[:, -CHUNK:]
    _, live = codec.decode(past, codec.initial_state())
    expected, _ = codec.decode(coming, live)
    for count in counts:
        rebuilt = codec.rebuild(past[:, -count:], first=count >= past.shape[1])
        frames, _ = codec.decode(coming, rebuilt)
        error = float((frames.double() - expected.double()).pow(2).mean())
        same = all(torch.equal(rebuilt[key], live[key]) for key in live)
        psnr_db = math.inf if error == 0.0 else -10.0 * math.log10(error)
        yield Seam(count, psnr_db, same and torch.equal(frames, expected))


def smooth_latents(size: tuple[int, int, int, int], seed: int) -> Tensor:
    """Normal latents [1, *size], size (F, C, h, w), that change slowly, as a video's do."""
    source = torch.Generator().manual_seed(seed)
    latents = torch.randn(size, generator=source)
    for f in range(1, len(latents)):
        fresh = math.sqrt(1 - SMOOTHNESS**2) * latents[f]
        latents[f] = SMOOTHNESS * latents[f - 1] + fresh
    return latents[None]
