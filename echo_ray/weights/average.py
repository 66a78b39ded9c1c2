"""The average of two weights folders of one model, tensor by tensor.

Where one training goes on from another, what lies between both is often better than either at what
the second gained and the first had (model soups, arXiv 2203.05482).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from echo_ray.errors import WeightsError
from echo_ray.weights.convert import check_target
from echo_ray.weights.folder import WeightsFolder
from echo_ray.weights.manifest import Manifest, Source, write_manifest
from echo_ray.weights.wording import listed

PRESET = "preset.toml"


def average(first: Path, second: Path, dst: Path, share: float) -> Manifest:
    """Write (1 - share) x first + share x second to the new folder `dst`, in the first's dtypes.

    The sum is taken in float32. Whole numbers, and files without weights, are the first's. Raises
    `WeightsError` for a share outside 0 to 1, for folders that are not of one model in one layout,
    and for a folder that is taken.
    """
    if not 0.0 <= share <= 1.0:
        raise WeightsError(f"share {share}: give 0 (the first folder) to 1 (the second)")
    one, other = WeightsFolder.open(first), WeightsFolder.open(second)
    other.check(one.manifest.config)
    _check_layout(one, other)
    check_target(dst, overwrite=False)
    dst.mkdir(parents=True, exist_ok=True)
    for name in one.manifest.files:
        target = dst / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file(_mixed(_tensors(one, name), _tensors(other, name), share), target)
        else:
            shutil.copyfile(first / name, target)
    if (first / PRESET).exists():
        shutil.copyfile(first / PRESET, dst / PRESET)
    sources = [*_sources(one, 1.0 - share), *_sources(other, share)]
    return write_manifest(dst, one.manifest.config, list(one.manifest.files), sources)


def _check_layout(one: WeightsFolder, other: WeightsFolder) -> None:
    mine, theirs = _places(one), _places(other)
    wrong = sorted(n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n))
    if wrong:
        raise WeightsError(
            f"{one.path} and {other.path} do not hold the same tensors in the same files: "
            f"{listed(wrong)}; average two folders that were made alike"
        )


def _places(folder: WeightsFolder) -> dict[str, tuple[str, tuple[int, ...]]]:
    """File and shape of every tensor."""
    shapes = {part: folder.shapes(part) for part in folder.index}
    return {
        f"{part}.{key}": (file, shapes[part][key])
        for part, files in folder.index.items()
        for key, file in files.items()
    }


def _tensors(folder: WeightsFolder, name: str) -> dict[str, Tensor]:
    return {
        f"{part}.{key}": tensor
        for part, files in folder.index.items()
        if name in files.values()
        for key, tensor in folder.part(part).items()
        if files[key] == name
    }


def _mixed(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    def mixed(key: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return torch.lerp(value.float(), other[key].float(), share).to(value.dtype)

    return {key: mixed(key, value).contiguous() for key, value in one.items()}


def _sources(folder: WeightsFolder, share: float) -> list[Source]:
    return [
        Source(", ".join(folder.index), name, record.bytes, record.sha256, f"share {share:g}")
        for name, record in folder.manifest.files.items()
        if name.endswith(".safetensors")
    ]
