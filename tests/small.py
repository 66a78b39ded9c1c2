"""A model small enough for unit tests, with random weights from a seed, and the real engine."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from echo_ray.engine.engine import EchoEngine
from echo_ray.weights.modules import Modules, build_modules
from echo_ray.preset import (
    CacheShape,
    GroupCodecShape,
    DiTShape,
    MemoryShape,
    Preset,
    SamplerShape,
    WordTextShape,
)


def small_preset(steps: tuple[int, ...] = (1000, 500), **cache: object) -> Preset:
    """A complete preset of a few thousand parameters; keyword arguments change its cache."""
    memory = MemoryShape(frames=3, encoder_layers=1, recache=bool(cache.pop("recache", True)))
    if cache.get("policy") == "window":
        cache["memory"] = None
    return Preset(
        name="small",
        fps=16,
        dit=DiTShape(
            dim=16,
            num_heads=2,
            ffn_dim=32,
            num_layers=2,
            latent_height=4,
            latent_width=4,
            text_dim=16,
            text_len=6,
            freq_dim=16,
            in_channels=4,
            out_channels=4,
        ),
        cache=replace(CacheShape(memory=memory), **cache),  # type: ignore[arg-type]
        sampler=SamplerShape(steps=steps),
        text=WordTextShape(layers=1, heads=2),
        codec=GroupCodecShape(widths=(8, 8), blocks=1),
    )


@lru_cache(maxsize=4)
def _modules(with_memory: bool) -> Modules:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        preset = small_preset() if with_memory else small_preset(policy="window")
        modules = build_modules(preset)
        for module in modules.named().values():
            module.eval().requires_grad_(requires_grad=False)
    return modules


def small_engine(steps: tuple[int, ...] = (1000, 500), **cache: object) -> EchoEngine:
    """A real engine over the small preset; every one has the same weights."""
    preset = small_preset(steps, **cache)
    modules = _modules(preset.cache.memory is not None)
    return EchoEngine(preset, modules, torch.device("cpu"), threads=1)
