"""Clips that sessions begin with: checked and stored by the router, read back by replicas.

A clip is at rest before its session exists for anybody, as the bytes that were uploaded; they are
read again into frames wherever the session begins. Whatever is slow happens on a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from concurrent.futures import ThreadPoolExecutor

from echo_ray.config import LimitsSection
from echo_ray.engine.clip_check import ClipChecker
from echo_ray.engine.upload import read_taken_clip
from echo_ray.errors import (
    ClipInvalid,
    ClipLost,
    ClipTooLarge,
    EchoError,
    SnapshotNotFound,
    StoreCorrupt,
)
from echo_ray.session.engine_port import StreamShape
from echo_ray.session.records import ClipRef, SessionRecord
from echo_ray.storage.interface import SnapshotStore


class ClipDesk:
    """Takes clips in; one per router."""

    def __init__(self, store: SnapshotStore, shape: StreamShape, limits: LimitsSection) -> None:
        self._store = store
        self._checker = ClipChecker(shape, limits)
        # A thread of its own: clips wait for each other, and nothing else waits for clips.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="clips")

    async def take(self, session_id: str, data: bytes) -> ClipRef:
        """Store the clip for a session that is to be. Raises `ClipInvalid`, `ClipTooLarge`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._take, session_id, data)

    async def drop(self, session_id: str, clip: ClipRef) -> None:
        """Delete the clip of a session that could not be created."""
        await asyncio.to_thread(self._store.delete, session_id, clip.id)

    def close(self) -> None:
        """Take no more; the clip in hand is finished."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self, session_id: str, data: bytes) -> ClipRef:
        frames = self._checker.frames(data)
        digest = hashlib.sha256(data).hexdigest()
        clip = ClipRef(id=f"clip-{digest[:16]}", sha256=digest, frames=frames)
        self._store.put(session_id, clip.id, data)
        try:
            # Until the first snapshot, everything that the session is follows from these bytes.
            self._store.make_durable(session_id, clip.id)
        except EchoError:
            with contextlib.suppress(EchoError):
                self._store.delete(session_id, clip.id)
            raise
        return clip


def first_frames(store: SnapshotStore, record: SessionRecord, shape: StreamShape) -> bytes:
    """The frames of the session's clip, none if it has none. Raises `ClipLost`.

    Other errors of the store are for the caller, who may try again.
    """
    clip = record.clip
    if clip is None:
        return b""
    try:
        data = store.get(record.id, clip.id)
    except (SnapshotNotFound, StoreCorrupt) as error:
        raise _lost(record, clip, error.message) from error
    if hashlib.sha256(data).hexdigest() != clip.sha256:
        raise _lost(record, clip, f"its {len(data)} bytes are not those that were uploaded")
    try:
        return read_taken_clip(data, shape, clip.frames)
    except (ClipInvalid, ClipTooLarge) as error:
        raise _lost(record, clip, error.message) from error


def _lost(record: SessionRecord, clip: ClipRef, why: str) -> ClipLost:
    return ClipLost(
        f"session {record.id!r} begins with clip {clip.id!r}, which cannot be read any more, and "
        f"has no snapshot to go on from: {why}; restore the store or create the session again",
        param="session_id",
    )
