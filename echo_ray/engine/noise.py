"""Counter-based noise: a pure function of (seed, chunk, step), whatever ran before.

Philox turns a key and a counter into bits, the same on every machine; Box-Muller in float64 turns
the bits into Gaussians, rounded to float32 last. Nothing here has a state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from echo_ray.model.to_device import to_device

SEED_LIMIT = 2**63


def gaussian(seed: int, chunk: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 values of `shape`, on the host."""
    count = math.prod(shape)
    pairs = (count + 1) // 2
    bits = np.random.Philox(key=seed, counter=(0, step, chunk, 0)).random_raw(2 * pairs)
    # 53 random bits each; the first uniform lies in (0, 1], so that its logarithm is finite.
    uniform = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(1.0 - uniform[:pairs]))
    angle = 2.0 * math.pi * uniform[pairs:]
    values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


@dataclass(frozen=True, slots=True)
class SessionNoise:
    """A session's noise on its device: called with (chunk, step)."""

    seed: int
    size: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    def __call__(self, chunk: int, step: int) -> Tensor:
        values = gaussian(self.seed, chunk, step, self.size).to(self.dtype)
        return to_device(values, self.device)
