"""Reading what a session needs to go on: a point, the control log, the committed digests.

Runs on a thread of its own; knows nothing about engines or sockets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from echo_ray.clock import Clock
from echo_ray.errors import SnapshotError, SnapshotNotFound, StoreCorrupt
from echo_ray.serve.clips import first_frames
from echo_ray.serve.telemetry import Telemetry, log
from echo_ray.session import snapshot as codec
from echo_ray.session.engine_port import StreamShape
from echo_ray.session.records import ControlEntry, SessionRecord, SnapshotRef
from echo_ray.session.replay import points_to_try
from echo_ray.session.snapshot import Snapshot
from echo_ray.storage.interface import Directory, SnapshotStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """Everything that bringing a session back takes, as it stood in the stores."""

    record: SessionRecord
    point: SnapshotRef | None
    """None: point 0, opened from the record."""
    snapshot: Snapshot | None
    first_frames: bytes
    """The session's clip, if it has one and goes on from point 0."""
    entries: Sequence[ControlEntry]
    digests: Mapping[int, str]
    refs: Sequence[SnapshotRef]
    refused: frozenset[str]
    """Snapshots that could not be read."""

    @property
    def index(self) -> int:
        """Index of the first chunk that the point leads to."""
        return self.point.chunk_index if self.point else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetcher:
    """Reads sessions back from the stores."""

    directory: Directory
    store: SnapshotStore
    telemetry: Telemetry
    clock: Clock
    shape: StreamShape
    limit_chunks: int
    """Longest replay that is worth its time for the sake of past segments."""
    limit_bytes: int

    def fetch(self, session_id: str, needed: int | None, refused: frozenset[str]) -> Fetched:
        """Read the session back; `needed` is the first chunk that somebody wants (None: the next).

        A snapshot that cannot be read is passed over for the next best. Raises
        `StoreUnavailable` if the stores cannot answer, `SessionNotFound`, and `ClipLost` if there
        is no snapshot and the clip that the session begins with is gone or damaged.
        """
        record = self.directory.get(session_id)
        refs = self.directory.snapshots(session_id)
        points = points_to_try(
            refs,
            next_index=record.next_index,
            needed=record.next_index if needed is None else min(needed, record.next_index),
            limit=self.limit_chunks,
            refused=refused,
        )
        point, snapshot, refused = self._first_readable(session_id, points, refused)
        start = point.chunk_index if point else 0
        return Fetched(
            record=record,
            point=point,
            snapshot=snapshot,
            first_frames=b"" if point else first_frames(self.store, record, self.shape),
            entries=self.directory.controls(session_id, 0),
            digests=self.directory.digests(session_id, start, record.next_index),
            refs=refs,
            refused=refused,
        )

    def _first_readable(
        self, session_id: str, points: Sequence[SnapshotRef | None], refused: frozenset[str]
    ) -> tuple[SnapshotRef | None, Snapshot | None, frozenset[str]]:
        for ref in points:
            if ref is None:
                break
            began_s = self.clock.monotonic()
            try:
                blob = self.store.get(session_id, ref.id)
                snapshot = codec.decode(blob, limit_bytes=self.limit_bytes)
            except (SnapshotError, SnapshotNotFound, StoreCorrupt) as error:
                refused |= {ref.id}
                self.telemetry.count("snapshots", outcome="unreadable")
                log(
                    logging.WARNING,
                    "snapshot_unreadable",
                    session=session_id,
                    snapshot=ref.id,
                    error=error.message,
                )
                continue
            self.telemetry.observe(
                "snapshot_duration_seconds", self.clock.monotonic() - began_s, op="read"
            )
            return ref, snapshot, refused
        return None, None, refused


Fetch = Callable[[str, int | None, frozenset[str]], Fetched]
