"""A weights folder of what was trained: every tensor in sixteen bits."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from echo_ray.errors import WeightsError
from echo_ray.preset import Preset
from echo_ray.training.lora import adapter_tensors, merged_tensors
from echo_ray.training.trainable import CaptionTable
from echo_ray.training.video_model import VideoModel
from echo_ray.weights.folder import WeightsFolder
from echo_ray.weights.manifest import FileRecord, file_record, write_manifest

FILE = "weights.safetensors"
ADAPTER = "lora.safetensors"
PRESET = "preset.toml"


def write_weights(
    preset: Preset,
    model: VideoModel | None,
    codec: nn.Module,
    folder: Path,
    start: WeightsFolder | None = None,
) -> None:
    """Write the model's `dit.`, `memory.` and `text.`, the codec's `codec.`, manifest and preset.

    What a LoRA has changed is merged in; the adapter alone lies beside it, in the published layout.
    A model whose prompts are read by an encoder of its own has that, and its codec, linked from the
    folder that it began from.
    """
    tensors = {} if model is None else merged_tensors(model)
    frozen = model is not None and isinstance(model.text, CaptionTable)
    if not frozen:
        tensors.update({f"codec.{k}": v for k, v in codec.state_dict().items()})
    folder.mkdir(parents=True, exist_ok=True)
    dtype = torch.bfloat16 if preset.dtype == "bfloat16" else torch.float16
    _save(tensors, folder / FILE, dtype)
    records = {FILE: file_record(folder / FILE)}
    if frozen and start is not None:
        records.update(_linked(start, folder))
    write_manifest(folder, preset, records)
    (folder / PRESET).write_text(preset_text(preset), encoding="utf-8")
    adapter = {} if model is None else adapter_tensors(model.dit)
    if adapter:
        _save(adapter, folder / ADAPTER, dtype)


def preset_text(preset: Preset) -> str:
    """A `preset.toml`; read, it is this preset again."""
    return "\n".join(_table("", asdict(preset))) + "\n"


def _table(path: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Lines of a table and those inside it. What is None is left out, for TOML cannot say it."""
    for key, value in values.items():
        if value is not None and not isinstance(value, Mapping):
            yield f"{key} = {json.dumps(value)}"
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield f"\n[{path}{key}]"
            yield from _table(f"{path}{key}.", value)


def _linked(start: WeightsFolder, folder: Path) -> dict[str, FileRecord]:
    """The files of another folder that hold nothing trained, as links or copies in this one."""
    trained = {name for part in ("dit", "memory") for name in start.index.get(part, {}).values()}
    records = {n: r for n, r in start.manifest.files.items() if n not in trained and n != FILE}
    for name in records:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            continue
        try:
            os.link(start.path / name, target)
        except OSError:
            # Another file system.
            shutil.copyfile(start.path / name, target)
    return records


def _save(tensors: Mapping[str, Tensor], file: Path, dtype: torch.dtype) -> None:
    halves = {k: _half(k, v, dtype) for k, v in tensors.items()}
    part = file.with_suffix(".part")
    save_file(halves, part)
    part.replace(file)


def _half(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    half = value.detach().to("cpu", dtype).contiguous()
    if not bool(torch.isfinite(half).all()):
        raise WeightsError(f"{name}: holds values that are not finite; the training diverged")
    return half
