"""Keeping the past of every session in the durable store, so that it outlives its directory.

Whoever changes a session in the directory tells a `PastKeeper`, which soon afterwards reads the
session back and stores its past (`session/restoring.py`): off the path of whoever waits for the
change, and once for changes that come close together. A past that could not be stored is tried
again for as long as this process lives.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from enum import Enum, auto

from echo_ray.clock import Clock
from echo_ray.errors import EchoError, SessionNotFound, StoreCorrupt, StoreUnavailable
from echo_ray.session import restoring
from echo_ray.session.control_log import DIGESTS_KEPT
from echo_ray.session.forking import Past
from echo_ray.storage.interface import Directory, SnapshotStore

SOON_S = 0.2
"""From a change that somebody was told of to the copy of the past that knows it."""
EVERY_S = 10.0
"""A stream that goes on has its past stored about this often."""
RETRY_S = 2.0
_REMEMBERED = 4096


class _Errand(Enum):
    STORE = auto()
    DELETE = auto()


def read_past(directory: Directory, session_id: str) -> Past:
    """The session with everything that brings it back. Raises `SessionNotFound`.

    Every entry before the record's next index is in it: nothing is pinned there after the record
    is read.
    """
    record = directory.get(session_id)
    end = record.next_index
    entries = directory.controls(session_id)
    listed = [ref for ref in directory.snapshots(session_id) if ref.chunk_index <= end]
    # A replay begins at one of those; pinned ones may lie far back.
    start = min((ref.chunk_index for ref in listed if not ref.pinned), default=0)
    return Past(
        record=replace(record, owner=None, lease_until=0.0),
        controls=entries,
        digests=directory.digests(session_id, max(start, end - DIGESTS_KEPT), end),
        snapshots=listed[::-1],
    )


class PastKeeper:
    """Stores the pasts of the sessions that this process changes, on a thread of its own.

    The thread begins with the first change, and opens the store. `directory` must tell a session
    that does not exist from one that was lost, and is not closed here.
    """

    def __init__(
        self,
        directory: Directory,
        open_store: Callable[[], SnapshotStore],
        clock: Clock,
        *,
        soon_s: float = SOON_S,
        every_s: float = EVERY_S,
        retry_s: float = RETRY_S,
    ) -> None:
        self._directory = directory
        self._open_store = open_store
        self._clock = clock
        self._soon_s, self._every_s, self._retry_s = soon_s, every_s, retry_s
        self._store: SnapshotStore | None = None
        self._due: dict[str, tuple[float, _Errand]] = {}
        self._stored: OrderedDict[str, tuple[str, float]] = OrderedDict()
        """Session -> the past stored last, and when."""
        self._failing = False
        self._wake = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def changed(self, session_id: str) -> None:
        """Somebody was told of a change: store the past soon."""
        self._note(session_id, self._soon_s, _Errand.STORE)

    def moved(self, session_id: str) -> None:
        """The session has got on: store the past unless that was done a short while ago."""
        now_s = self._clock.monotonic()
        with self._wake:
            _, stored_s = self._stored.get(session_id, ("", now_s - self._every_s))
        rest_s = stored_s + self._every_s - now_s
        self._note(session_id, max(self._soon_s, rest_s), _Errand.STORE)

    def deleted(self, session_id: str) -> None:
        """The session is gone: let nothing be left from which it could come back."""
        self._note(session_id, self._soon_s, _Errand.DELETE)

    def waiting(self) -> int:
        """How many sessions wait for it."""
        with self._wake:
            return len(self._due)

    def close(self, timeout_s: float = 5.0) -> None:
        """Try everything that waits once more, for `timeout_s` at most; twice is allowed."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
        if self._store is not None:
            self._store.close()

    def _note(self, session_id: str, within_s: float, errand: _Errand) -> None:
        at_s = self._clock.monotonic() + within_s
        with self._wake:
            if self._closing:
                return
            known = self._due.get(session_id)
            if known is not None and known[1] is _Errand.DELETE:
                return
            sooner_s = at_s if known is None else min(at_s, known[0])
            self._due[session_id] = (sooner_s, errand)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pasts", daemon=True)
                self._thread.start()
            self._wake.notify_all()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._closing and (rest_s := self._rest_s()) != 0:
                    self._wake.wait(rest_s)
                last = self._closing
                todo = list(self._due) if last else [min(self._due, key=self._due_at)]
                errands = [(session_id, self._due.pop(session_id)[1]) for session_id in todo]
            for session_id, errand in errands:
                self._do(session_id, errand)
            if last:
                return

    def _due_at(self, session_id: str) -> float:
        return self._due[session_id][0]

    def _rest_s(self) -> float | None:
        """Seconds until something is due, 0 if something is; None: nothing waits."""
        if not self._due:
            return None
        return max(0.0, min(at_s for at_s, _ in self._due.values()) - self._clock.monotonic())

    def _do(self, session_id: str, errand: _Errand) -> None:
        try:
            if self._store is None:
                self._store = self._open_store()
            if errand is _Errand.DELETE:
                self._store.delete_session(session_id)
                self._stored.pop(session_id, None)
            else:
                self._keep(self._store, session_id)
        except StoreUnavailable as error:
            if not isinstance(error, StoreCorrupt):
                self._note(session_id, self._retry_s, errand)
            self._told(session_id, error)
        except EchoError as error:
            self._told(session_id, error)
        except Exception:
            logging.getLogger(__name__).exception("past_not_kept")
        else:
            self._failing = False

    def _keep(self, store: SnapshotStore, session_id: str) -> None:
        read_at = self._clock.wall()
        try:
            past = read_past(self._directory, session_id)
        except SessionNotFound:
            return
        past_id = restoring.past_id(past, read_at)
        store.put(session_id, past_id, restoring.encode(past))
        try:
            self._directory.get(session_id)
        except SessionNotFound:
            # Deleted meanwhile, and its blobs perhaps before this one was there.
            store.delete(session_id, past_id)
            return
        with self._wake:
            before, _ = self._stored.pop(session_id, (past_id, 0.0))
            self._stored[session_id] = (past_id, self._clock.monotonic())
            if len(self._stored) > _REMEMBERED:
                self._stored.popitem(last=False)
        if before != past_id:
            store.delete(session_id, before)

    def _told(self, session_id: str, error: EchoError) -> None:
        """Log the first failure of a row."""
        if not self._failing:
            fields = {"session": session_id, "error": error.message, "waiting": self.waiting()}
            logging.getLogger(__name__).warning("past_not_kept", extra={"fields": fields})
        self._failing = True
