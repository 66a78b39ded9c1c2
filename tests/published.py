"""The published model's layout scaled down: every kind of part, a few thousand parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from echo_ray.preset import (
    CacheShape,
    DiTShape,
    MemoryShape,
    Preset,
    SamplerShape,
    TinyVaeShape,
    UMT5Shape,
    WanVaeShape,
)


def published_preset(
    *, normalize_keys: bool = False, dtype: str = "float32", latent_height: int = 4
) -> Preset:
    memory = MemoryShape(frames=3, encoder_layers=2, normalize_keys=normalize_keys)
    return Preset(
        name="published-small",
        fps=16,
        dtype=dtype,
        dit=DiTShape(
            dim=16,
            num_heads=2,
            ffn_dim=24,
            num_layers=2,
            latent_height=latent_height,
            latent_width=4,
            text_dim=16,
            text_len=12,
            freq_dim=8,
            in_channels=4,
            out_channels=4,
        ),
        cache=CacheShape(memory=memory),
        sampler=SamplerShape(),
        text=UMT5Shape(vocab=400, dim_attn=16, dim_ffn=20, num_heads=2, num_layers=2),
        codec=WanVaeShape(mean=(0.1,) * 4, std=(1.5,) * 4, dim=4, dim_mult=(1, 2, 2, 2)),
        small_codec=TinyVaeShape(encoder_width=4, decoder_widths=(8, 4, 4, 4)),
    )


def read(file: Path) -> dict[str, Any]:
    data: dict[str, Any] = torch.load(file, weights_only=True)
    return data


def change(file: Path, how: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a checkpoint with something changed in it."""
    data = read(file)
    how(data)
    torch.save(data, file)
