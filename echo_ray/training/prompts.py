"""Prompts without pictures, as a bank: enough for distribution matching, which reads no latents.

A line of the file is one sample. Prompts that follow each other in it are separated by a bar, and
each holds for an equal part of the chunks.

Shapes: S samples, K chunks.
"""

from __future__ import annotations

from pathlib import Path

import torch

from echo_ray.errors import ConfigError
from echo_ray.preset import Preset
from echo_ray.training.bank import Bank, caption_ids
from echo_ray.training.recipe import ClipsSection

BAR = "|"


def prompt_bank(preset: Preset, section: ClipsSection, file: Path) -> Bank:
    """Read a file of prompts. Raises `ConfigError` if it cannot be read, or holds none."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"clips.prompts: {file}: cannot be read: {e}") from e
    samples = [prompts for line in lines if (prompts := _split(line))]
    if not samples:
        raise ConfigError(f"clips.prompts: {file} holds no prompt; write one sample a line")
    chunks = section.chunks
    longest = max(map(len, samples))
    if longest > chunks:
        raise ConfigError(
            f"clips.prompts: {file}: a line has {longest} prompts, a sample {chunks} chunks; "
            "raise clips.chunks, or switch less often"
        )
    ids, table = caption_ids(
        preset, [[part[k * len(part) // chunks] for k in range(chunks)] for part in samples]
    )
    dit, count = preset.dit, len(samples)
    frames = chunks * preset.cache.frames_per_chunk
    nothing = torch.zeros(1, 1, 1, 1, 1, dtype=torch.float16).expand(
        count, frames, dit.in_channels, dit.latent_height, dit.latent_width
    )
    hidden = torch.zeros(count, chunks, dtype=torch.bool)
    return Bank(nothing, ids, hidden, torch.zeros(count, dtype=torch.uint8), table, "prompts")


def _split(line: str) -> list[str]:
    return [prompt.strip() for prompt in line.split(BAR) if prompt.strip()]
