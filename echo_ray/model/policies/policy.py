"""What a cache policy decides (spec sections 4, 5 and 13)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class CallFrames:
    """The frames of one forward pass and what the cache holds during it.

    `slots` are the absolute frame indices held, sink first, the call's own frames included.
    """

    first: int
    count: int
    slots: tuple[int, ...]
    sink_frames: int

    @property
    def sink_slots(self) -> tuple[int, ...]:
        return self.slots[: self.sink_frames]

    @property
    def local_slots(self) -> tuple[int, ...]:
        return self.slots[self.sink_frames :]


@dataclass(frozen=True, slots=True)
class Layout:
    """Frame positions of every tier in one call, for the rotary embedding."""

    sink: tuple[int, ...]
    memory: tuple[int, ...]
    local: tuple[int, ...]
    query: tuple[int, ...]


class CachePolicy(Protocol):
    """Where frames stand; everything else about the cache is the same for all policies."""

    @property
    def evicts_rotated_keys(self) -> bool:
        """Whether the memory encoder reads rotated keys (else keys before rope)."""
        ...

    @property
    def memory_in_bulk(self) -> bool:
        """Whether a recache of more frames than a chunk attends to the memory."""
        ...

    def layout(self, call: CallFrames, memory_frames: int) -> Layout:
        """Positions of the tiers; `memory_frames` is 0 where memory is not presented."""
        ...

    def memory_fits(self, call: CallFrames, memory_frames: int) -> bool:
        """Whether the memory's positions in this call are clear of the sink's."""
        ...


def span(start: int, count: int) -> tuple[int, ...]:
    return tuple(range(start, start + count))
