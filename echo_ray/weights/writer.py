"""A safetensors file written as a stream: one tensor in memory at a time, hashed on the way.

The format is eight bytes of header length, a JSON header padded with spaces, and the data.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from echo_ray.errors import WeightsError
from echo_ray.weights.manifest import FileRecord

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BLOCK_VALUES = 4 * 2**20
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to be written; `make` is called when its turn comes, and its result let go."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def written_dtype(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """What a tensor is written as: floating-point values as wanted, others as they are."""
    return wanted if wanted is not None and dtype.is_floating_point else dtype


def header(entries: Sequence[Entry]) -> bytes:
    """The file's beginning, up to the first byte of data."""
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        if entry.dtype not in NAMES:
            raise WeightsError(f"{entry.name}: dtype {entry.dtype} is not written by this format")
        end = offset + entry.size_bytes
        content[entry.name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """Wide values first, so that each tensor is aligned to its own item size."""
    return sorted(entries, key=lambda e: (-e.dtype.itemsize, e.name))


def file_bytes(entries: Sequence[Entry]) -> int:
    """Size of the file that `write_file` will write."""
    return len(header(entries)) + sum(e.size_bytes for e in entries)


@dataclass(slots=True)
class _Sink:
    """An open file that knows the hash and the length of what went into it."""

    file: BinaryIO
    wrote: Callable[[int], object]
    sha256: hashlib._Hash = field(default_factory=hashlib.sha256)
    size: int = 0

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(data)
        self.wrote(len(data))


def write_file(
    file: Path, entries: Sequence[Entry], wrote: Callable[[int], object] = lambda _: None
) -> FileRecord:
    """Write a new file, telling `wrote` how many bytes went out; gives its size and hash.

    Raises `WeightsError` naming the tensor that holds a value that is not finite, and `OSError`.
    """
    with file.open("xb") as f:
        sink = _Sink(f, wrote)
        sink.write(header(entries))
        for entry in entries:
            _write_entry(entry, sink)
    return FileRecord(sink.size, sink.sha256.hexdigest())


def _write_entry(entry: Entry, sink: _Sink) -> None:
    """A function of its own, so that nothing of one tensor is held when the next is made."""
    for block in finite_blocks(entry):
        sink.write(block.view(torch.uint8).numpy().data)


def finite_blocks(entry: Entry) -> Iterator[Tensor]:
    """A tensor's values in the dtype they are written in, some millions at a time.

    Raises `WeightsError` for values that are not finite.
    """
    value = entry.make()
    if tuple(value.shape) != entry.shape:
        raise WeightsError(f"{entry.name}: {tuple(value.shape)} instead of {entry.shape}")
    for block in torch.split(value.detach().reshape(-1), _BLOCK_VALUES):
        converted = block.to(entry.dtype).contiguous()
        if entry.dtype.is_floating_point and not _is_finite(converted):
            raise WeightsError(
                f"{entry.name}: holds values that are not finite{_cause(block, entry)}; "
                "the file is damaged, or its training had diverged"
            )
        yield converted


def _is_finite(block: Tensor) -> bool:
    """Without a second block: both extremes of one that holds a NaN are NaN."""
    return block.numel() == 0 or all(bool(e.isfinite()) for e in torch.aminmax(block))


def _cause(block: Tensor, entry: Entry) -> str:
    if _is_finite(block):
        return f" once rounded to {str(entry.dtype).removeprefix('torch.')} (try --dtype keep)"
    return ""
