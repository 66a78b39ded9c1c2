"""The few-step flow-matching schedule (spec section 7)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from echo_ray.preset import SamplerShape

TRAIN_TIMESTEPS = 1000


@lru_cache(maxsize=16)
def sigma_table(shift: float) -> Tensor:
    """The 1000 noise levels, float32: σ = shift u / (1 + (shift - 1) u), u = 1 - i / 1000."""
    u = 1 - torch.arange(TRAIN_TIMESTEPS, dtype=torch.float64) / TRAIN_TIMESTEPS
    return (shift * u / (1 + (shift - 1) * u)).to(torch.float32)


def timestep_table(shift: float) -> Tensor:
    """Timesteps of the table, float32: 1000 σ. There is no entry for 0."""
    return sigma_table(shift) * TRAIN_TIMESTEPS


def warped_timestep(step: int, shift: float) -> float:
    """The timestep that an integer denoising step stands for: the table's entry 1000 - step."""
    if step == 0:
        return 0.0
    return float(timestep_table(shift)[TRAIN_TIMESTEPS - step])


def lookup_index(timestep: float, shift: float) -> int:
    """Index of the entry with the nearest timestep, the first one on ties."""
    return int((timestep_table(shift) - timestep).abs().argmin())


def sigma_at(timestep: float, shift: float) -> float:
    """σ of the nearest table entry; timestep 0 looks up the last entry, not 0."""
    return float(sigma_table(shift)[lookup_index(timestep, shift)])


class Schedule:
    """The warped timesteps and noise levels of a sampler, as host numbers."""

    def __init__(self, sampler: SamplerShape) -> None:
        self.kind = sampler.kind
        self.context_noise = sampler.context_noise
        self.timesteps = tuple(warped_timestep(k, sampler.shift) for k in sampler.steps)
        self.sigmas = tuple(sigma_at(t, sampler.shift) for t in self.timesteps)

    def __len__(self) -> int:
        return len(self.timesteps)


def clean_from_flow(x: Tensor, flow: Tensor, sigma: float) -> Tensor:
    """x0 = x - σ v, in float64, cast back to the flow's dtype."""
    return (x.double() - sigma * flow.double()).to(flow.dtype)


def noise_from_flow(x: Tensor, flow: Tensor, sigma: float) -> Tensor:
    """The noise that the flow implies, x + (1 - σ) v, in float64: what Euler steps use."""
    return (x.double() + (1 - sigma) * flow.double()).to(flow.dtype)


def renoise(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """x at noise level σ: (1 - σ) x0 + σ ε."""
    return (1 - sigma) * clean + sigma * noise
