"""The modules of the video model as one thing that trains, and where their weights come from.

Shapes: B clips, K chunks, P words.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from echo_ray.errors import ConfigError
from echo_ray.model.codec import Codec
from echo_ray.model.dit import DiT, PromptKV
from echo_ray.model.memory import MemoryEncoder
from echo_ray.model.state_dict import load_strict
from echo_ray.preset import Preset
from echo_ray.training.trainable import CaptionTable, new_text
from echo_ray.weights.folder import WeightsFolder
from echo_ray.weights.parts import build_codec, codec_part
from echo_ray.weights.text import UMT5Prompts


class VideoModel(nn.Module):
    """The trained modules under the prefixes of the weights file."""

    def __init__(self, preset: Preset, *, with_memory: bool = True) -> None:
        super().__init__()
        dit, memory = preset.dit, preset.cache.memory
        self.dit = DiT(dit)
        self.text = new_text(preset)
        self.memory = MemoryEncoder(dit, memory) if memory and with_memory else None
        nn.init.zeros_(self.dit.head.head.weight)

    def prompts(self, ids_BKP: Tensor) -> PromptKV:
        """Keys and values of every chunk's caption, clips and chunks in one axis [B * K, ...]."""
        return self.dit.encode_prompt(self.text(ids_BKP.flatten(0, -2)))


def chunk_prompt(prompts: PromptKV, batch: int, chunks: int, k: int) -> PromptKV:
    """Chunk k's part of prompts encoded for all chunks of all clips at once."""
    return PromptKV(
        tuple(
            (
                key.view(batch, chunks, *key.shape[1:])[:, k],
                value.view(batch, chunks, *value.shape[1:])[:, k],
            )
            for key, value in prompts.layers
        )
    )


def load_video_model(
    preset: Preset,
    folder: Path,
    fresh: Collection[str],
    device: torch.device,
    *,
    with_memory: bool = True,
) -> VideoModel:
    """A model with the folder's weights in every part but the fresh ones, in float32.

    Raises `WeightsError` if a part is missing or does not fit.
    """
    model = VideoModel(preset, with_memory=with_memory)
    # A table of captions has no weights of its own.
    parts = [n for n, m in model.named_children() if n not in fresh and m.state_dict()]
    if parts:
        source = WeightsFolder.open(folder)
        for name in parts:
            module = model.get_submodule(name)
            # Copies: what is read stays mapped from its file, and training writes.
            values = {k: v.clone() for k, v in source.part(name, dtype=torch.float32).items()}
            load_strict(module, values, f"{folder}, {name}")
    return model.to(device)


def load_codec(preset: Preset, folder: Path, device: torch.device) -> Codec:
    """The frozen codec of a weights folder. Raises `WeightsError` if there is none."""
    codec, part = build_codec(preset.codec, preset.dit), codec_part(preset.codec)
    values = WeightsFolder.open(folder).part(part, dtype=torch.float32)
    load_strict(codec, values, f"{folder}, {part}")
    return codec.eval().requires_grad_(requires_grad=False).to(device)


def read_captions(
    preset: Preset, folder: Path, captions: tuple[str, ...], *models: VideoModel | None
) -> None:
    """Give models that do not read words what the folder's encoder makes of all captions."""
    tables = [m.text for m in models if m is not None and isinstance(m.text, CaptionTable)]
    if not tables:
        return
    place = tables[0].rows_UPE.device
    encoder = UMT5Prompts(preset, WeightsFolder.open(folder), place, place, keep=True)
    tables[0].fill(captions, encoder)
    for table in tables[1:]:
        table.rows_UPE = tables[0].rows_UPE


def training_device(name: str) -> torch.device:
    """The device of a run. Raises `ConfigError` if this machine has none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "run.device: cuda is not available on this machine; use cpu", param="run.device"
        )
    return torch.device(name)
