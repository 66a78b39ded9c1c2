"""A weights folder of what was trained: every tensor in half precision, in one file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from echo_ray.errors import WeightsError
from echo_ray.model.group_codec import GroupCodec
from echo_ray.preset import Preset
from echo_ray.weights.manifest import write_manifest

FILE = "weights.safetensors"


def write_weights(preset: Preset, model: nn.Module, codec: GroupCodec, folder: Path) -> None:
    """Write the model's `dit.`, `memory.` and `text.`, the codec's `codec.`, and a manifest."""
    tensors = {**model.state_dict(), **{f"codec.{k}": v for k, v in codec.state_dict().items()}}
    halves = {k: _half(k, v) for k, v in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{FILE}.part"
    save_file(halves, part)
    part.replace(folder / FILE)
    write_manifest(folder, preset, [FILE])


def _half(name: str, value: Tensor) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise WeightsError(f"{name}: holds values that are not finite; the training diverged")
    return value.detach().half().contiguous()
