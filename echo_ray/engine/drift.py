"""The drift meter: how far a stream has moved from its own beginning, chunk by chunk.

First version: scalars of the decoded frames and of the latents, each against the session's own
baseline (the first chunks after a start or a prompt switch). It reports and never steers.

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

BASELINE_CHUNKS = 4
FROZEN_CHUNKS = 4
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
    """Sums of the baseline's parts, how many chunks made it, and for how long nothing moved."""

    sums: list[float] = field(default_factory=lambda: [0.0] * len(PARTS))
    chunks: int = 0
    still: int = 0

    def to_numbers(self) -> list[float]:
        return [*self.sums, float(self.chunks), float(self.still)]

    @classmethod
    def from_numbers(cls, numbers: list[float]) -> DriftState:
        *sums, chunks, still = numbers
        return cls(sums, int(chunks), int(still))


NUMBERS = len(PARTS) + 2


def frame_parts(frames_NHW3: NDArray[np.uint8]) -> dict[str, float]:
    """Luminance, contrast, saturation, sharpness and motion at low resolution, each 0 to 1."""
    step = max(1, frames_NHW3.shape[1] // 64)
    small = frames_NHW3[:, ::step, ::step].astype(np.float32) / 255.0
    luma = small @ _LUMA
    red, green, blue = small[..., 0], small[..., 1], small[..., 2]
    # Two passes over whole planes; reducing an axis of three is many times slower.
    spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    still = np.diff(luma, axis=0)
    return {
        "luminance": float(luma.mean()),
        "contrast": float(luma.std()),
        "saturation": float(spread.mean()),
        "sharpness": float(
            np.abs(np.diff(luma, axis=1)).mean() + np.abs(np.diff(luma, axis=2)).mean()
        ),
        "motion": float(np.abs(still).mean()) if len(still) else 0.0,
    }


def read_drift(state: DriftState, parts: dict[str, float], *, restart: bool) -> DriftReading:
    """Take one chunk's parts into the state and compare them with the baseline.

    `restart`: this chunk begins a new baseline, because the prompt changed with it.
    """
    if restart:
        state.sums, state.chunks, state.still = [0.0] * len(PARTS), 0, 0
    values = [parts[name] for name in PARTS]
    finite = all(map(math.isfinite, values))
    state.still = state.still + 1 if parts["motion"] < STILL else 0
    if finite and state.chunks < BASELINE_CHUNKS:
        state.sums = [a + b for a, b in zip(state.sums, values, strict=True)]
        state.chunks += 1
    base = {n: s / max(state.chunks, 1) for n, s in zip(PARTS, state.sums, strict=True)}
    moved = {n: _moved(parts[n], base[n], FLOOR[n]) for n in PARTS}
    score = math.sqrt(sum(m * m for m in moved.values()) / len(moved)) if finite else SCORE_LIMIT
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
    faded = parts["contrast"] < 0.35 * base["contrast"]
    pale = parts["saturation"] < 0.5 * base["saturation"] or parts["luminance"] > 0.95
    if faded and pale:
        flags.append("washed_out")
    if parts["latent_spread"] > 3.0 * max(base["latent_spread"], FLOOR["latent_spread"]):
        flags.append("exploded")
    return tuple(flags)


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
