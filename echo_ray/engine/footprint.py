"""How much memory a session's state takes, and the engine's process on its device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor

from echo_ray.engine.cache import Window


class Kept(Protocol):
    """What stays allocated from one session to the next."""

    @property
    def size_bytes(self) -> int: ...


def state_bytes(state: Any) -> int:
    """Bytes of all tensors of a state, each storage once; asks the device nothing."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors(state)}
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Window):
        yield from value.tensors()
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        yield from _tensors([getattr(value, f.name) for f in fields(value)])


def device_memory(device: torch.device, **kept: Kept) -> dict[str, int]:
    """Bytes by kind: `allocated`, `reserved` and `peak` on a GPU, `resident` on a CPU; of them
    those that are `kept`, by name."""
    own = {name: part.size_bytes for name, part in kept.items()}
    if device.type != "cuda":
        return {"resident": psutil.Process().memory_info().rss} | own
    return own | {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "peak": torch.cuda.max_memory_allocated(device),
    }
