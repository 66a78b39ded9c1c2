"""What the model makes of a few prompts, by the same generator that serves.

Shapes: B prompts, N pixel frames, H W pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from echo_ray.engine.generator import Generator
from echo_ray.preset import Preset
from echo_ray.training.pictures import contact_sheet
from echo_ray.weights.modules import Modules

SCENES: tuple[tuple[str, str], ...] = (
    ("a red ball bouncing on a blue background", "a yellow square on a black background"),
    ("a big green square on a white background", "a big green square on a gray background"),
    ("a cyan triangle on a black background", "a magenta ball on a black background"),
    ("a small yellow ball moving quickly on a gray background", "a blue triangle on a white wall"),
    ("a magenta square on a black background", "empty black background"),
    ("a red ball and a green square on a white background", "a blue ball on a gray background"),
)
"""A first prompt and what it switches to half way."""


@torch.no_grad()
def sample(
    preset: Preset, modules: Modules, scenes: tuple[tuple[str, str], ...], chunks: int, seed: int
) -> Tensor:
    """Frames [B, N, 3, H, W] of every scene, its prompt switched in the middle."""
    generator = Generator(modules.dit, modules.memory, preset.cache, preset.sampler)
    source = torch.Generator().manual_seed(seed)
    dit = preset.dit
    size = (
        len(scenes), preset.cache.frames_per_chunk, dit.in_channels,
        dit.latent_height, dit.latent_width,
    )  # fmt: skip

    def noise(chunk: int, step: int) -> Tensor:
        return torch.randn(size, generator=source).to(generator.device)

    first, second = (
        torch.cat([modules.text.encode(p) for p in part]) for part in zip(*scenes, strict=True)
    )
    state = generator.start(first)
    decoder = modules.codec.initial_state()
    frames = []
    for chunk in range(chunks):
        if chunk == chunks // 2:
            generator.switch(state, second)
        pixels, decoder = modules.codec.decode(generator.generate(state, noise), decoder)
        frames.append(pixels)
    return torch.cat(frames, dim=1)


def sample_sheet(preset: Preset, modules: Modules, file: Path, chunks: int) -> None:
    """A row per scene, two frames a chunk."""
    frames = sample(preset, modules, SCENES, chunks, seed=0)
    contact_sheet(frames[:, 2 :: preset.frames_per_chunk // 2], file)
