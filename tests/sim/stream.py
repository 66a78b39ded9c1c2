"""What a session's chunks are: hashes that follow from seed and prompts, made by anybody alike."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from echo_ray.session.records import SessionRecord

POINT_EVERY = 4
CHUNK_S = 0.75
FINGERPRINT = "sim"


@dataclass(frozen=True, slots=True)
class StreamState:
    """The state of one stream between two chunks."""

    next_index: int
    hidden: int

    @property
    def at_point(self) -> bool:
        return self.next_index % POINT_EVERY == 0


@dataclass(frozen=True, slots=True)
class Segment:
    """What readers get of a chunk."""

    index: int
    digest: str
    discontinuity: bool = False


def opened(record: SessionRecord) -> StreamState:
    """The state before the first chunk."""
    return StreamState(0, _fold(record.seed, record.prompt))


def stepped(state: StreamState, prompts: Sequence[str]) -> tuple[StreamState, str]:
    """The state after the next chunk, and that chunk's digest."""
    hidden = _fold(state.hidden, *prompts, str(state.next_index))
    return StreamState(state.next_index + 1, hidden), f"{hidden:08x}"


def start_s(index: int) -> float:
    """Media time at which a chunk begins."""
    return CHUNK_S * index


class Oracle:
    """What every chunk of a session has to be, by its record and its switches alone."""

    def __init__(self, record: SessionRecord) -> None:
        self._states = [opened(record)]
        self._digests: list[str] = []

    def digest(self, index: int, switches: Mapping[int, Sequence[str]]) -> str:
        """The digest of chunk `index`; `switches` (by chunk) must be final up to there."""
        while len(self._digests) <= index:
            at = len(self._digests)
            state, digest = stepped(self._states[-1], switches.get(at, ()))
            self._states.append(state)
            self._digests.append(digest)
        return self._digests[index]


def _fold(hidden: int, *words: str) -> int:
    return zlib.crc32(" ".join((str(hidden), *words)).encode())
