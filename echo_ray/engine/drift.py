"""The drift meter: how far a stream has moved from its own beginning, chunk by chunk.

Scalars of the decoded frames and of the latents, each against the session's own baseline: the
first chunks after a start or a prompt switch, but for the very first, in which the picture is still
on its way. It reports and never steers.

A flag says that the picture as a whole has failed. An object that is gone is not such a failure: it
shows in the parts and the score, and the flags stay away while the ground behind it is as it was.

Shapes: N frames, H W pixels, 3 colours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo_ray.session.chunk import DriftReading

SETTLING_CHUNKS = 1
"""Chunks before the baseline; they are compared with themselves."""
BASELINE_CHUNKS = 4
FROZEN_CHUNKS = 4
WASHED_CHUNKS = 3
PARTS = (
    "luminance",
    "contrast",
    "saturation",
    "sharpness",
    "motion",
    "latent_mean",
    "latent_spread",
    "memory_norm",
    "memory_update",
)
GROUND = ("ground_dark", "ground_light", "ground_colour")
"""What most of a picture is: brightness that two and three fifths of the pixels do not exceed, and
saturation that half do not. Things smaller than two fifths of the picture hardly move them."""
SAME_GROUND = 0.03
"""Change of each of them up to which the ground is as it was."""
# What counts as one unit of change where a part's baseline is near zero.
FLOOR = {
    "luminance": 0.05,
    "contrast": 0.05,
    "saturation": 0.05,
    "sharpness": 0.02,
    "motion": 0.01,
    "latent_mean": 0.25,
    "latent_spread": 0.1,
    "memory_norm": 0.25,
    "memory_update": 0.25,
}
STILL = 1e-4
SCORE_LIMIT = 1e6
"""The score of a stream whose numbers are no longer finite; JSON has no infinity."""
_LUMA = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)


@dataclass(slots=True)
class DriftState:
    """Sums of the baseline's parts and ground, and three counts of chunks."""

    sums: list[float] = field(default_factory=lambda: [0.0] * len(PARTS + GROUND))
    chunks: int = 0
    """How many went by until the baseline was full."""
    still: int = 0
    """For how many nothing has moved."""
    pale: int = 0
    """For how many the picture has been washed out."""

    def to_numbers(self) -> list[float]:
        return [*self.sums, float(self.chunks), float(self.still), float(self.pale)]

    @classmethod
    def from_numbers(cls, numbers: list[float]) -> DriftState:
        *sums, chunks, still, pale = numbers
        return cls(sums, int(chunks), int(still), int(pale))


NUMBERS = len(PARTS + GROUND) + 3


def frame_parts(frames_NHW3: NDArray[np.uint8]) -> dict[str, float]:
    """Luminance, contrast, saturation, sharpness, motion and ground, each 0 to 1.

    At low resolution: about 64 rows, and half as many for the ground.
    """
    step = max(1, frames_NHW3.shape[1] // 64)
    small = frames_NHW3[:, ::step, ::step].astype(np.float32) / 255.0
    luma = small @ _LUMA
    red, green, blue = small[..., 0], small[..., 1], small[..., 2]
    # Two passes over whole planes; reducing an axis of three is many times slower.
    spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    still = np.diff(luma, axis=0)
    dark, light = _quantiles(luma, 0.4, 0.6)
    (colour,) = _quantiles(spread, 0.5)
    return {
        "luminance": float(luma.mean()),
        "contrast": float(luma.std()),
        "saturation": float(spread.mean()),
        "sharpness": float(
            np.abs(np.diff(luma, axis=1)).mean() + np.abs(np.diff(luma, axis=2)).mean()
        ),
        "motion": float(np.abs(still).mean()) if len(still) else 0.0,
        **dict(zip(GROUND, (dark, light, colour), strict=True)),
    }


def _quantiles(values_NHW: NDArray[np.floating], *shares: float) -> list[float]:
    """The values that such shares of every second row's and column's pixels do not exceed."""
    flat = values_NHW[:, ::2, ::2].ravel()
    places = [int(share * (flat.size - 1)) for share in shares]
    ordered = np.partition(flat, places)
    return [float(ordered[place]) for place in places]


def read_drift(state: DriftState, parts: dict[str, float], *, restart: bool) -> DriftReading:
    """Take one chunk's parts into the state and compare them with the baseline.

    `restart`: this chunk begins a new baseline, because the prompt changed with it.
    """
    names = PARTS + GROUND
    if restart:
        state.sums, state.chunks, state.still, state.pale = [0.0] * len(names), 0, 0, 0
    values = [parts[name] for name in names]
    finite = all(map(math.isfinite, values))
    if finite and state.chunks < SETTLING_CHUNKS + BASELINE_CHUNKS:
        before = state.sums if state.chunks > SETTLING_CHUNKS else [0.0] * len(names)
        state.sums = [a + b for a, b in zip(before, values, strict=True)]
        state.chunks += 1
    made_of = max(state.chunks - SETTLING_CHUNKS, 1)
    base = {n: s / made_of for n, s in zip(names, state.sums, strict=True)}
    state.still = state.still + 1 if parts["motion"] < STILL else 0
    state.pale = state.pale + 1 if finite and _is_washed_out(parts, base) else 0
    moved = [_moved(parts[n], base[n], FLOOR[n]) for n in PARTS]
    score = math.sqrt(sum(m * m for m in moved) / len(moved)) if finite else SCORE_LIMIT
    flags = _flags(state, parts, base, finite)
    return DriftReading(score=min(score, SCORE_LIMIT), parts=parts, flags=flags)


def _moved(value: float, base: float, floor: float) -> float:
    """Change in units of the baseline's own size, never of less than the floor."""
    return (value - base) / max(abs(base), floor)


def _flags(
    state: DriftState, parts: dict[str, float], base: dict[str, float], finite: bool
) -> tuple[str, ...]:
    if not finite:
        return ("exploded",)
    flags = []
    if state.still >= FROZEN_CHUNKS and base["motion"] >= STILL:
        flags.append("frozen")
    if state.pale >= WASHED_CHUNKS:
        flags.append("washed_out")
    if parts["latent_spread"] > 3.0 * max(base["latent_spread"], FLOOR["latent_spread"]):
        flags.append("exploded")
    return tuple(flags)


def _is_washed_out(parts: dict[str, float], base: dict[str, float]) -> bool:
    """Whether the picture has lost its contrast and colours, or all of its colours.

    Contrast and colours also go with the one thing that had them. Then the ground is as it was.
    """
    colour, contrast = base["saturation"], base["contrast"]
    if parts["contrast"] < 0.35 * contrast:
        least = 0.5 * max(colour, FLOOR["saturation"])
        is_pale = parts["saturation"] < least or parts["luminance"] > 0.95
        return is_pale and any(abs(parts[n] - base[n]) > SAME_GROUND for n in GROUND)
    has_both = colour > FLOOR["saturation"] and contrast > FLOOR["contrast"]
    return has_both and parts["saturation"] < 0.15 * colour


def latent_statistics(latents: Tensor, before: Tensor | None, after: Tensor | None) -> Tensor:
    """[mean size per channel, spread per channel, memory norm, relative memory update]."""
    wide = latents.float()
    mean = wide.mean(dim=(0, 1, 3, 4)).abs().mean()
    spread = wide.std(dim=(0, 1, 3, 4)).mean()
    zero = torch.zeros_like(mean)
    if before is None or after is None:
        return torch.stack([mean, spread, zero, zero])
    norm = after.float().pow(2).mean().sqrt()
    update = (after.float() - before.float()).pow(2).mean().sqrt() / norm.clamp_min(1e-6)
    return torch.stack([mean, spread, norm, update])
