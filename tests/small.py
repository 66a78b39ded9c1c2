"""A model small enough for unit tests, with random weights from a seed, and the real engine."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from echo_ray.engine.engine import EchoEngine
from echo_ray.model.backends import PLAIN, Attention
from echo_ray.model.computing import Precision, use
from echo_ray.preset import (
    CacheShape,
    CodecShape,
    DiTShape,
    GroupCodecShape,
    MemoryShape,
    Preset,
    SamplerShape,
    TinyVaeShape,
    WanVaeShape,
    WordTextShape,
)
from echo_ray.weights.modules import Modules, build_modules

CODECS: dict[str, CodecShape] = {
    "group": GroupCodecShape(widths=(8, 8), blocks=1),
    "wan": WanVaeShape(
        mean=(0.1, -0.2, 0.3, 0.0), std=(1.5, 0.7, 1.1, 0.9), dim=4, dim_mult=(1, 1, 1, 2)
    ),
    "tiny": TinyVaeShape(encoder_width=4, decoder_widths=(8, 8, 4, 4)),
}


def small_preset(
    steps: tuple[int, ...] = (1000, 500), codec: str = "group", **cache: object
) -> Preset:
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
        codec=CODECS[codec],
    )


@lru_cache(maxsize=8)
def _modules(with_memory: bool, codec: str) -> Modules:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        policy = "echo" if with_memory else "window"
        preset = small_preset(codec=codec, policy=policy)
        modules = build_modules(preset)
        for module in modules.named().values():
            module.eval().requires_grad_(requires_grad=False)
    return modules


def small_engine(
    steps: tuple[int, ...] = (1000, 500), codec: str = "group", **cache: object
) -> EchoEngine:
    """A real engine over the small preset; every one has the same weights."""
    preset = small_preset(steps, codec, **cache)
    modules = _modules(preset.cache.memory is not None, codec)
    return EchoEngine(preset, modules, torch.device("cpu"), threads=1)


def small_clip(codec: str, frames: int) -> bytes:
    """A clip of the small preset's size, no two frames the same: a square that moves and fades."""
    preset = small_preset(codec=codec)
    pixels = np.full((frames, preset.height, preset.width, 3), 30, dtype=np.uint8)
    for n in range(frames):
        x = n % (preset.width - 8)
        pixels[n, 8:16, x : x + 8] = (220 - n, 60, 90)
    return pixels.tobytes()


def small_tier(precision: Precision, attention: Attention = PLAIN, **cache: object) -> EchoEngine:
    """The engine of `small_engine` in another precision: the same weights, rounded."""
    preset = small_preset(**cache)  # type: ignore[arg-type]
    modules = deepcopy(_modules(preset.cache.memory is not None, "group"))
    modules = replace(modules, computing=use(modules.dit, modules.memory, attention, precision))
    return EchoEngine(preset, modules, torch.device("cpu"), threads=1)
