"""A snapshot store whose writes and reads are told of: how long, how many bytes, how they ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from echo_ray.errors import EchoError, SnapshotNotFound
from echo_ray.session.sweep import StoredBlob
from echo_ray.storage.interface import SweptStore
from echo_ray.storage.one_tier import OneTier


@dataclass(frozen=True, slots=True)
class StoreCall:
    """One write or read of a blob that has ended."""

    tier: str
    op: str
    """`write` or `read`."""
    outcome: str
    """`ok`, `missing` or `failed`."""
    seconds: float
    size_bytes: int
    """0 unless it went well."""


Tell = Callable[[StoreCall], None]


class TimedSnapshots(OneTier):
    """A store of one tier called `tier`, in front of the same store without a stop-watch."""

    def __init__(self, inner: SweptStore, tier: str, tell: Tell) -> None:
        self.name = inner.name
        self._inner = inner
        self._tier = tier
        self._tell = tell

    def put(self, session_id: str, snapshot_id: str, blob: bytes) -> None:
        began_s = time.perf_counter()
        try:
            self._inner.put(session_id, snapshot_id, blob)
        except EchoError:
            self._ended("write", "failed", began_s)
            raise
        self._ended("write", "ok", began_s, len(blob))

    def get(self, session_id: str, snapshot_id: str) -> bytes:
        began_s = time.perf_counter()
        try:
            blob = self._inner.get(session_id, snapshot_id)
        except SnapshotNotFound:
            self._ended("read", "missing", began_s)
            raise
        except EchoError:
            self._ended("read", "failed", began_s)
            raise
        self._ended("read", "ok", began_s, len(blob))
        return blob

    def delete(self, session_id: str, snapshot_id: str) -> None:
        self._inner.delete(session_id, snapshot_id)

    def delete_session(self, session_id: str) -> None:
        self._inner.delete_session(session_id)

    def list_blobs(self, session_id: str | None = None) -> Iterator[StoredBlob]:
        return self._inner.list_blobs(session_id)

    def close(self) -> None:
        self._inner.close()

    def _ended(self, op: str, outcome: str, began_s: float, size_bytes: int = 0) -> None:
        seconds = time.perf_counter() - began_s
        self._tell(StoreCall(self._tier, op, outcome, seconds, size_bytes))
