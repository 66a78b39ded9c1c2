"""Memory of one session's window, at addresses that never change, and the pool it is leased from.

A recorded graph is bound to addresses, so windows do not come and go with sessions: an arena is
allocated when one is first needed, given back when its session's state is closed, and leased again.
Nothing is cleared between two sessions, for nothing is read that the new one has not written.

Shapes: Y layers, B batch, N tokens, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor

from echo_ray.engine.graphs import Graphs
from echo_ray.preset import CacheShape, DiTShape


class Arena:
    """The slots of one window, and the graphs recorded over them."""

    def __init__(
        self,
        dit: DiTShape,
        cache: CacheShape,
        *,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        graphs: Graphs | None = None,
    ) -> None:
        """`graphs`: what records and replays forwards over this arena; None: all run eagerly."""
        memory = cache.memory_frames * dit.tokens_per_frame
        window = cache.window_frames * dit.tokens_per_frame

        def slots(count: int) -> Tensor:
            size = (dit.num_layers, batch, count, dit.num_heads, dit.head_dim)
            return torch.zeros(size, device=device, dtype=dtype)

        self.batch = batch
        self.graphs = graphs
        self.raw_YBNHD = slots(window)
        self.keys_YBNHD = slots(memory + window)
        self.values_YBNHD = slots(memory + window)

    def tensors(self) -> list[Tensor]:
        """Everything that stays allocated; what a graph keeps for itself the device counts."""
        inputs = self.graphs.inputs.tensors() if self.graphs else []
        return [self.raw_YBNHD, self.keys_YBNHD, self.values_YBNHD, *inputs]

    @property
    def size_bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.tensors())


class Arenas:
    """The arenas of one device: as many as there ever were sessions at once, `kept` at most free.

    Not thread-safe: the engine's thread leases and gives back.
    """

    def __init__(self, make: Callable[[int], Arena], kept: int) -> None:
        """`make`: a new arena of a batch."""
        self._make = make
        self._kept = kept
        self._free: list[Arena] = []
        self._all: WeakSet[Arena] = WeakSet()

    def lease(self, batch: int) -> Arena:
        """An arena nobody else has; a new one if none of this batch is free."""
        for arena in reversed(self._free):
            if arena.batch == batch:
                self._free.remove(arena)
                return arena
        arena = self._make(batch)
        self._all.add(arena)
        return arena

    def give_back(self, arena: Arena) -> None:
        """Let others have it; its session reads and writes it no more."""
        if arena.graphs is not None:
            arena.graphs.inputs.forget()
        if len(self._free) < self._kept:
            self._free.append(arena)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def count(self) -> int:
        return len(self._all)

    @property
    def size_bytes(self) -> int:
        """What all of them take, leased ones too."""
        return sum(arena.size_bytes for arena in self._all)
