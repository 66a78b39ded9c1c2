"""How a session is brought to where its viewers are: which point to load, what to replay.

A snapshot is the state at a point; everything after it follows from the control log. So resuming is
loading a point at or before the first chunk that somebody needs, and replaying up to the first
chunk that was never committed, comparing digests on the way.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from echo_ray.session.records import ControlEntry, SnapshotRef


def points_to_try(
    snapshots: Sequence[SnapshotRef],
    *,
    next_index: int,
    needed: int,
    limit: int,
    refused: Collection[str] = (),
) -> tuple[SnapshotRef | None, ...]:
    """Points to load from, best first; None is point 0, the fresh session, and always there.

    Best is the newest point from which chunk `needed` can be made again, provided that the replay
    up to `next_index` has at most `limit` chunks. If there is none, going on matters more than the
    past: the oldest point within the limit, else the newest one. The others follow, in case the
    first cannot be read; `refused` names snapshots that already could not.
    """
    usable = [s for s in snapshots if s.chunk_index <= next_index and s.id not in refused]
    ordered = newest_first(usable)
    near = [s for s in ordered if next_index - s.chunk_index <= limit]
    far = [s for s in ordered if next_index - s.chunk_index > limit]
    covering = [s for s in near if s.chunk_index <= needed]
    later = sorted((s for s in near if s.chunk_index > needed), key=lambda s: s.chunk_index)
    if next_index <= limit:
        return (*covering, None)
    return (*covering, *later, *far, None)


@dataclass(frozen=True, slots=True)
class EventMarks:
    """What a chunk's metadata says of control events."""

    started: tuple[str, ...] = ()
    """Events pinned to this chunk."""
    active: tuple[str, ...] = ()
    """The event in effect, if any."""
    completed: tuple[str, ...] = ()
    """Events that one of the started ones supersedes."""


class ControlLog:
    """A session's control entries as far as they are known here, by chunk."""

    def __init__(self, entries: Sequence[ControlEntry] = ()) -> None:
        self._entries = sorted(entries, key=lambda e: e.chunk)

    def fix(self, start: int, entries: Sequence[ControlEntry]) -> None:
        """Replace what is known from chunk `start` on by `entries`, read later from the log."""
        cut = bisect_left(self._entries, start, key=lambda e: e.chunk)
        self._entries[cut:] = sorted(entries, key=lambda e: e.chunk)

    def at(self, index: int) -> tuple[ControlEntry, ...]:
        """Entries pinned to chunk `index`, in the order they were appended."""
        return tuple(self._entries[self._before(index) : self._through(index)])

    def prompts(self, index: int) -> tuple[str, ...]:
        """The switches that chunk `index` is made under, in order."""
        return tuple(e.prompt for e in self.at(index))

    def marks(self, index: int) -> EventMarks:
        """Started, active and completed events of chunk `index`."""
        before, through = self._before(index), self._through(index)
        started = tuple(e.event_id for e in self._entries[before:through])
        active = (self._entries[through - 1].event_id,) if through else ()
        superseded = self._entries[max(0, before - 1) : through - 1] if started else []
        return EventMarks(started, active, tuple(e.event_id for e in superseded))

    def _before(self, index: int) -> int:
        return bisect_left(self._entries, index, key=lambda e: e.chunk)

    def _through(self, index: int) -> int:
        return bisect_right(self._entries, index, key=lambda e: e.chunk)


class Verdict(StrEnum):
    """What comparing a replayed chunk with the committed one says."""

    SAME = "same"
    DIFFERENT = "different"
    UNKNOWN = "unknown"
    """The committed digest is not kept any more."""


def compare(committed: Mapping[int, str], index: int, digest: str) -> Verdict:
    """Whether a replayed chunk is the one that was committed."""
    expected = committed.get(index)
    if expected is None:
        return Verdict.UNKNOWN
    return Verdict.SAME if expected == digest else Verdict.DIFFERENT


def to_prune(
    snapshots: Sequence[SnapshotRef], *, kept: int, spared: str | None = None
) -> tuple[SnapshotRef, ...]:
    """Snapshots to delete: unpinned ones beyond the newest `kept`, but never the id `spared`."""
    unpinned = newest_first([s for s in snapshots if not s.pinned])
    return tuple(s for s in unpinned[kept:] if s.id != spared)


def newest_first(snapshots: Sequence[SnapshotRef]) -> list[SnapshotRef]:
    """Snapshots by their points, the newest first; of one point, the one made last first."""
    return sorted(snapshots, key=lambda s: (s.chunk_index, s.created_at, s.id), reverse=True)
