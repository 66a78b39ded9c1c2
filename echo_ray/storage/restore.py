"""Filling a directory that lost everything from the durable store: the errand round `restoring`.

Any number of processes may do it at once. Sessions that are there already are left as they are, so
whoever is second finds nothing to do; and the first that has brought back all that can be read says
that the directory is whole. Newest pasts first: those sessions have viewers.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from echo_ray.clock import Clock
from echo_ray.errors import (
    ArchiveCorrupt,
    ArchiveError,
    ArchiveForeign,
    ArchiveVersion,
    EchoError,
    InvalidRequestError,
    NotFoundError,
    SessionExists,
    SessionNotFound,
    SnapshotNotFound,
    StoreCorrupt,
)
from echo_ray.session import restoring
from echo_ray.session.forking import Past
from echo_ray.session.records import SnapshotRef
from echo_ray.session.sweep import StoredBlob, pasts
from echo_ray.storage.interface import Directory, SweptStore
from echo_ray.storage.redis_identity import Identity

AT_ONCE = 8
_UNREADABLE = (ArchiveError, StoreCorrupt, SnapshotNotFound)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of the sessions of the durable store."""

    brought_back: Sequence[str] = ()
    there: Sequence[str] = ()
    """In the directory already; untouched."""
    refused: Mapping[str, EchoError] = field(default_factory=dict)
    """What cannot be brought back as it lies there, and why."""


class Restorer:
    """Brings sessions back into `directory` from `store`; owns both."""

    def __init__(
        self,
        directory: Directory,
        store: SweptStore,
        identity: Identity,
        clock: Clock,
        *,
        limit_bytes: int,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self._directory = directory
        self._store = store
        self._identity = identity
        self._clock = clock
        self._limit_bytes = limit_bytes
        self._close = close

    def close(self) -> None:
        for closable in (self._directory, self._store):
            closable.close()
        self._close()

    def lost(self) -> bool:
        """Whether the directory has lost everything, or is new."""
        return self._identity.lost()

    def restore_all(self) -> Report:
        """Bring everything back, and say that the directory is whole.

        Raises `StoreUnavailable`, and then it is not whole yet: do it again. Does nothing more once
        somebody else has said that it is: what is missing from then on was deleted.
        """
        report = self._restore(_by_session(self._store.list_blobs()), self.lost)
        self._identity.set()
        return report

    def restore(self, session_ids: Collection[str]) -> Report:
        """Bring these back, lost or not. Raises `NotFoundError` for one that the store lacks."""
        found = {}
        for session_id in session_ids:
            found[session_id] = list(self._store.list_blobs(session_id))
            if not found[session_id]:
                raise NotFoundError(
                    f"the durable store holds nothing of session {session_id!r}; see to the id, "
                    "and to the bucket and prefix of storage.s3",
                    param="session",
                )
        return self._restore(found, lambda: True)

    def missing(self) -> list[str]:
        """Sessions of the durable store that the directory does not know."""
        known = {record.id for record in self._directory.list()}
        return sorted(_by_session(self._store.list_blobs()).keys() - known)

    def _restore(
        self, found: Mapping[str, Sequence[StoredBlob]], wanted: Callable[[], bool]
    ) -> Report:
        newest_first = sorted(found, key=lambda id_: -max(b.stored_at for b in found[id_]))
        brought_back: list[str] = []
        there: list[str] = []
        refused: dict[str, EchoError] = {}
        pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="restore")
        try:
            tries = {
                id_: pool.submit(partial(self._restore_one, id_, found[id_], wanted))
                for id_ in newest_first
            }
            for session_id, tried in tries.items():
                try:
                    (brought_back if tried.result() else there).append(session_id)
                except (ArchiveError, InvalidRequestError, StoreCorrupt) as error:
                    refused[session_id] = error
        finally:
            pool.shutdown(cancel_futures=True)
        return Report(brought_back=brought_back, there=there, refused=refused)

    def _restore_one(
        self, session_id: str, blobs: Sequence[StoredBlob], wanted: Callable[[], bool]
    ) -> bool:
        """Whether the session was brought back; False: it is there, or not to come back."""
        with suppress(SessionNotFound):
            self._directory.get(session_id)
            return False
        past = self._newest_past(session_id, blobs)
        added = self._added(past, blobs)
        whole = restoring.brought_back(past, blobs, self._clock.wall(), added)
        if not wanted():
            return False
        try:
            self._directory.restore(whole)
        except SessionExists:
            return False
        if not wanted():
            # Somebody else had brought it back before it was deleted.
            with suppress(SessionNotFound):
                self._directory.delete(session_id)
            return False
        return True

    def _newest_past(self, session_id: str, blobs: Sequence[StoredBlob]) -> Past:
        failure: EchoError = ArchiveCorrupt(
            f"session {session_id!r} has {len(blobs)} blobs and no past among them: an older "
            "release wrote them; begin a new session"
        )
        name, limit = self._store.name, self._limit_bytes
        for number, past_id in enumerate(pasts([blob.snapshot_id for blob in blobs])):
            try:
                blob = self._store.get(session_id, past_id)
                past = restoring.decode(blob, store=name, limit_bytes=limit)
                if past.record.id != session_id:
                    raise ArchiveForeign(
                        f"{past_id!r} under session {session_id!r} is of session "
                        f"{past.record.id!r}; delete it"
                    )
            except ArchiveVersion:
                # An older one would bring back less than a newer release can.
                raise
            except _UNREADABLE as error:
                failure = error if number == 0 else failure
                continue
            return past
        raise failure

    def _added(self, past: Past, blobs: Sequence[StoredBlob]) -> SnapshotRef | None:
        """The reference to a snapshot that is newer than all that the past names."""
        session_id, point = past.record.id, restoring.unnamed_point(past, blobs)
        if point is None:
            return None
        try:
            data = self._store.get(session_id, point.blob.snapshot_id)
        except _UNREADABLE:
            return None
        return SnapshotRef(
            id=point.blob.snapshot_id,
            session_id=session_id,
            chunk_index=point.chunk_index,
            size_bytes=len(data),
            digest=hashlib.sha256(data).hexdigest(),
            created_at=point.blob.stored_at,
            store=self._store.name,
            epoch=point.epoch,
        )


def _by_session(blobs: Iterable[StoredBlob]) -> dict[str, list[StoredBlob]]:
    found: defaultdict[str, list[StoredBlob]] = defaultdict(list)
    for blob in blobs:
        found[blob.session_id].append(blob)
    return found
