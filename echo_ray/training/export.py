"""A weights folder of what was trained: every tensor in half precision, in one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from echo_ray.errors import WeightsError
from echo_ray.preset import Preset
from echo_ray.training.lora import adapter_tensors, merged_tensors
from echo_ray.training.video_model import VideoModel
from echo_ray.weights.manifest import write_manifest

FILE = "weights.safetensors"
ADAPTER = "lora.safetensors"


def write_weights(preset: Preset, model: VideoModel | None, codec: nn.Module, folder: Path) -> None:
    """Write the model's `dit.`, `memory.` and `text.`, the codec's `codec.`, and a manifest.

    What a LoRA has changed is merged in; the adapter alone lies beside it, in the published layout.
    """
    tensors = {f"codec.{k}": v for k, v in codec.state_dict().items()}
    if model is not None:
        tensors.update(merged_tensors(model))
    folder.mkdir(parents=True, exist_ok=True)
    _save(tensors, folder / FILE)
    write_manifest(folder, preset, [FILE])
    adapter = {} if model is None else adapter_tensors(model.dit)
    if adapter:
        _save(adapter, folder / ADAPTER)


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    halves = {k: _half(k, v) for k, v in tensors.items()}
    part = file.with_suffix(".part")
    save_file(halves, part)
    part.replace(file)


def _half(name: str, value: Tensor) -> Tensor:
    half = value.detach().to("cpu", torch.float16).contiguous()
    if not bool(torch.isfinite(half).all()):
        raise WeightsError(f"{name}: holds values that are not finite; the training diverged")
    return half
