"""Random weights in the published files' own layout and names, of any preset's size.

For measuring, and for trying a conversion where the real files are not at hand. Tensors are filled
one at a time in a file mapped into memory, so the largest model needs no more memory than a block.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echo_ray.errors import ConfigError, WeightsError
from echo_ray.preset import Preset, UMT5Shape
from echo_ray.weights.layout import Shape, expected
from echo_ray.weights.lora import LINEARS
from echo_ray.weights.manifest import progress
from echo_ray.weights.parts import DTYPES
from echo_ray.weights.plan import require_published
from echo_ray.weights.sources import (
    GENERATOR_FILE,
    SMALL_CODEC_FILE,
    TEXT_FILE,
    TOKENIZER_FOLDER,
    VAE_FILE,
    is_long,
)
from echo_ray.weights.synthetic_tokenizer import write_tokenizer

LORA_FILE = "echo_infinity_lora.pt"
STYLES = ("generator", "model", "bare")
"""The generator file: with averaged tensors beside, all under one name, or nothing but tensors."""
_BLOCK_VALUES = 4 * 2**20
_ALIGNMENT = 64
_RANK_SHARE = 6
"""The published adapter's rank is a sixth of the model's width."""
_MEMORY = "query_memory_encoder"
_Spec = tuple[Shape, torch.dtype]


@dataclass(slots=True)
class _File:
    """One checkpoint to be written: tensors by their place, a path of dict keys."""

    name: str
    tensors: dict[tuple[str, ...], _Spec] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)

    def add(
        self, place: tuple[str, ...], shapes: Mapping[str, Shape], dtype: torch.dtype,
        renamed: Callable[[str], str] = lambda key: key,
    ) -> None:  # fmt: skip
        for key, shape in shapes.items():
            self.tensors[(*place, renamed(key))] = (shape, dtype)

    @property
    def size_bytes(self) -> int:
        return sum(_room(shape, dtype) for shape, dtype in self.tensors.values())


def synthesize(
    preset: Preset,
    folder: Path,
    *,
    seed: int = 0,
    style: str = "generator",
    only: Collection[str] | None = None,
) -> list[Path]:
    """Write published-layout files with random values; gives their paths.

    `only` names parts: dit, memory, text, codec, small_codec. Values depend on the seed and on
    the tensor's place alone. Raises `ConfigError` or `WeightsError`.
    """
    require_published(preset)
    if style not in STYLES:
        raise ConfigError(f"style: {style!r} is not allowed: {', '.join(STYLES)}", param="style")
    wanted = expected(preset)
    parts = set(wanted) if only is None else set(only)
    if unknown := sorted(parts - set(wanted)):
        raise ConfigError(
            f"--only: {unknown[0]!r} is not a part of {preset.name}: {', '.join(wanted)}"
        )
    if "memory" in parts and "dit" not in parts:
        raise ConfigError("--only: memory lies in the files of dit; add dit")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder}: is there already; name a new or empty folder")
    files = _files(preset, {p: s for p, s in wanted.items() if p in parts}, style)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with progress(2 * sum(file.size_bytes for file in files), "synthesizing") as bar:
            for file in files:
                _write(folder, file, seed, bar.update)
        if isinstance(preset.text, UMT5Shape) and "text" in parts:
            write_tokenizer(folder / "google" / TOKENIZER_FOLDER, preset.text.vocab)
    except OSError as e:
        raise WeightsError(f"{folder}: cannot be written: {e.strerror or e}") from e
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _files(preset: Preset, shapes: Mapping[str, Mapping[str, Shape]], style: str) -> list[_File]:
    files = []
    if "dit" in shapes:
        files.append(_generator(preset, shapes, style))
        if is_long(preset):
            files.append(_adapter(preset, shapes))
    for part, name, dtype in (
        ("codec", VAE_FILE, torch.float32),
        ("text", TEXT_FILE, torch.bfloat16),
        ("small_codec", SMALL_CODEC_FILE, torch.float16),
    ):
        if part in shapes:
            file = _File(name)
            file.add((), shapes[part], dtype)
            files.append(file)
    return files


def _generator(preset: Preset, shapes: Mapping[str, Mapping[str, Shape]], style: str) -> _File:
    """As training leaves it: wrapper names in the keys, no memory encoder in the average."""
    dtype = DTYPES[preset.dtype]
    memory = dict(shapes.get("memory", {}))
    if memory:
        memory["norm_k_out.weight"] = (preset.dit.dim,)
    whole = {**shapes["dit"], **{f"{_MEMORY}.{key}": shape for key, shape in memory.items()}}
    if style == "bare":
        file = _File(GENERATOR_FILE)
        file.add((), whole, dtype)
        return file
    file = _File(GENERATOR_FILE, extras={"step": 1})
    place = "model" if style == "model" else "generator"
    file.add((place,), whole, dtype, lambda key: f"model.{_in_block(key)}")
    if style == "generator":
        file.add(
            ("generator_ema",), shapes["dit"], dtype,
            lambda key: f"model._fsdp_wrapped_module.{_in_block(key)}",
        )  # fmt: skip
    return file


def _in_block(key: str) -> str:
    """FSDP wraps the blocks, each of them and not what stands outside."""
    kind, _, rest = key.partition(".")
    if kind != "blocks":
        return key
    number, _, inner = rest.partition(".")
    return f"blocks.{number}._fsdp_wrapped_module._checkpoint_wrapped_module.{inner}"


def _adapter(preset: Preset, shapes: Mapping[str, Mapping[str, Shape]]) -> _File:
    file = _File(LORA_FILE, extras={"step": 1})
    rank = max(1, preset.dit.dim // _RANK_SHARE)
    lora: dict[str, Shape] = {}
    for block in range(preset.dit.num_layers):
        for linear in LINEARS:
            key = f"blocks.{block}.{linear}"
            out, into = shapes["dit"][f"{key}.weight"]
            lora[f"base_model.model.{key}.lora_A.weight"] = (rank, into)
            lora[f"base_model.model.{key}.lora_B.weight"] = (out, rank)
    file.add(("generator_lora",), lora, torch.float32)
    file.add((_MEMORY,), shapes.get("memory", {}), torch.float32)
    return file


def _write(folder: Path, file: _File, seed: int, wrote: Callable[[int], object]) -> None:
    # One for all tensors: the memory of many short-lived ones is not given back.
    scratch = torch.empty(_BLOCK_VALUES)
    with _mapped(folder, file) as tensors:
        content: dict[str, Any] = dict(file.extras)
        for place, value in tensors:
            _fill(value, scratch, "/".join(place), f"{seed}/{file.name}")
            wrote(_room(tuple(value.shape), value.dtype))
            inside = content
            for name in place[:-1]:
                inside = inside.setdefault(name, {})
            inside[place[-1]] = value
        torch.save(content, folder / file.name)
        wrote(file.size_bytes)


@contextmanager
def _mapped(folder: Path, file: _File) -> Iterator[Iterator[tuple[tuple[str, ...], Tensor]]]:
    """Tensors of a file that has no name, and is gone when nobody holds one of them."""
    with tempfile.TemporaryFile(dir=folder) as room:
        room.truncate(max(file.size_bytes, _ALIGNMENT))
        yield _tensors(mmap.mmap(room.fileno(), 0), file)


def _tensors(memory: mmap.mmap, file: _File) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    offset = 0
    for place, (shape, dtype) in file.tensors.items():
        count = math.prod(shape)
        value = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)
        yield place, value.reshape(shape)
        offset += _room(shape, dtype)


def _room(shape: Shape, dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _fill(value: Tensor, scratch: Tensor, key: str, seed: str) -> None:
    """Draw values of the size that trained ones have, so that a forward stays finite."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    middle, spread = _scale(key, tuple(value.shape))
    for block in torch.split(value.view(-1), _BLOCK_VALUES):
        drawn = scratch[: block.numel()].normal_(middle, spread, generator=generator)
        block.copy_(drawn)


def _scale(key: str, shape: Shape) -> tuple[float, float]:
    """Mean and deviation of a tensor's values."""
    last = key.rpartition(".")[2]
    if last == "query_init":
        return 0.0, 0.014
    if last == "bias":
        return (2.0 if "gate_linear" in key else 0.0), 0.02
    if last == "gamma" or (last == "weight" and len(shape) == 1):
        return 1.0, 0.02
    fan_in = math.prod(shape[1:])
    # An adapter's second factor begins at zero and stays small.
    share = 0.1 if "lora_B" in key else 1.0
    return 0.0, share / math.sqrt(max(fan_in, 1))
