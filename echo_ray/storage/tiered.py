"""A fast snapshot store in front of a durable one.

Every blob goes into the hot store, and the first and then every Nth of a session into the durable
one as well: not while its writer waits, but as a debt that is paid from the hot store, by a thread
of this store or whoever calls `pay`. What must be durable now (a pinned snapshot, a clip) is told
so with `make_durable`, which returns when it is; what a paused session rests on, with
`make_durable_soon`, which is a debt like the others.

With one store down the other goes on. Blobs are taken to be immutable, as their ids make them: the
copies of one id in the two stores are never compared.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from echo_ray.errors import (
    ConfigError,
    EchoError,
    SnapshotNotFound,
    StoreCorrupt,
    StoreUnavailable,
)
from echo_ray.session.sweep import StoredBlob
from echo_ray.storage.interface import SweptStore

_SESSIONS_REMEMBERED = 4096


@dataclass(slots=True)
class _Known:
    """What this process remembers of a session; forgetting it costs a copy or a listing more."""

    puts: int = 0
    durable: set[str] = field(default_factory=set)
    """Ids that the durable store was seen to hold; there may be others."""


class TieredSnapshots:
    """A `SweptStore` of two, safe for any number of threads; other processes have their own.

    `durable_every` 1 makes every snapshot durable. `debt_limit` bounds how many unpaid copies are
    remembered; beyond it the oldest are forgotten. `retry_s` is the time between tries to pay.
    """

    name = "tiered"

    def __init__(
        self,
        hot: SweptStore,
        durable: SweptStore,
        *,
        durable_every: int = 6,
        debt_limit: int = 1024,
        retry_s: float = 5.0,
    ) -> None:
        for name, value in (("durable_every", durable_every), ("debt_limit", debt_limit)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be 1 or more", param=name)
        if retry_s <= 0:
            raise ConfigError(f"retry_s is {retry_s}; it must be more than 0 s", param="retry_s")
        self._hot = hot
        self._durable = durable
        self._durable_every = durable_every
        self._debt_limit = debt_limit
        self._retry_s = retry_s
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._owed: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._in_hand: tuple[str, str] | None = None
        self._withdrawn = False
        self._counts: Counter[str] = Counter()
        self._wake = threading.Condition()
        self._paying = threading.Lock()
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def tiers(self) -> Mapping[str, SweptStore]:
        """Both stores by their roles, the hot one first."""
        return {"hot": self._hot, "durable": self._durable}

    def start(self) -> None:
        """Pay debts on a thread from now on, until `close`."""
        self._thread = threading.Thread(target=self._run, name="durable-copies", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Let the thread pay once more, for no longer than `timeout_s`, then close both stores."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
        for store in self.tiers.values():
            store.close()

    def put(self, session_id: str, snapshot_id: str, blob: bytes) -> None:
        """Raises what the durable store raises if neither takes it."""
        try:
            self._hot.put(session_id, snapshot_id, blob)
        except StoreUnavailable as error:
            self._count("hot_failures")
            self._durable_instead(session_id, snapshot_id, blob, error)
            return
        if self._due(session_id):
            self._owe(session_id, snapshot_id)

    def get(self, session_id: str, snapshot_id: str) -> bytes:
        """From the hot store, else from the durable one, and then back into the hot one.

        Raises `SnapshotNotFound` only if both say so.
        """
        try:
            return self._hot.get(session_id, snapshot_id)
        except SnapshotNotFound as error:
            self._count("hot_misses")
            failed: EchoError = error
        except StoreUnavailable as error:
            self._count("hot_failures")
            failed = error
        try:
            blob = self._durable.get(session_id, snapshot_id)
        except SnapshotNotFound:
            # The hot store is asked first, so what it said is the better answer.
            raise failed from None
        except StoreUnavailable:
            self._count("durable_failures")
            raise
        if isinstance(failed, SnapshotNotFound | StoreCorrupt):
            with suppress(EchoError):
                self._hot.put(session_id, snapshot_id, blob)
                self._count("put_back")
        return blob

    def delete(self, session_id: str, snapshot_id: str) -> None:
        """From both; if one fails it is still deleted from the other, and the failure raised."""
        with self._wake:
            self._withdraw((session_id, snapshot_id))
            if session_id in self._known:
                self._known[session_id].durable.discard(snapshot_id)
        try:
            self._hot.delete(session_id, snapshot_id)
        finally:
            self._durable.delete(session_id, snapshot_id)

    def delete_session(self, session_id: str) -> None:
        """From both; if one fails it is still deleted from the other, and the failure raised."""
        with self._wake:
            self._known.pop(session_id, None)
            for key in [*self._owed, self._in_hand]:
                if key is not None and key[0] == session_id:
                    self._withdraw(key)
        try:
            self._hot.delete_session(session_id)
        finally:
            self._durable.delete_session(session_id)

    def list_blobs(self, session_id: str | None = None) -> Iterator[StoredBlob]:
        """Every blob once, as the hot store lists it if both hold it."""
        seen = set()
        for blob in self._hot.list_blobs(session_id):
            seen.add((blob.session_id, blob.snapshot_id))
            yield blob
        for blob in self._durable.list_blobs(session_id):
            if (blob.session_id, blob.snapshot_id) not in seen:
                yield blob

    def where(self, session_id: str, snapshot_id: str) -> tuple[str, ...]:
        """The roles of the stores that hold the blob, as in `tiers`; raises if one cannot say."""
        return tuple(
            role
            for role, store in self.tiers.items()
            if any(blob.snapshot_id == snapshot_id for blob in store.list_blobs(session_id))
        )

    def newest_durable(self, session_id: str, newest_first: Sequence[str]) -> str | None:
        """The first of these ids that the durable store holds; it should outlive the others.

        If that store cannot be asked, the first that it was seen to hold.
        """
        try:
            held = self._list_durable(session_id)
        except StoreUnavailable:
            self._count("durable_failures")
            with self._wake:
                held = set(self._remembered(session_id).durable)
            if held.isdisjoint(newest_first):
                raise
        return next((id_ for id_ in newest_first if id_ in held), None)

    def make_durable(self, session_id: str, snapshot_id: str) -> None:
        """Return when the durable store holds the blob.

        Raises `SnapshotNotFound` if neither store has it. If it raises `StoreUnavailable`, the copy
        stays owed and is made as soon as it can be.
        """
        try:
            if not self._is_durable(session_id, snapshot_id):
                blob = self._hot.get(session_id, snapshot_id)
                self._durable.put(session_id, snapshot_id, blob)
        except StoreUnavailable:
            self._owe(session_id, snapshot_id)
            raise
        self._made(session_id, snapshot_id)

    def make_durable_soon(self, session_id: str, snapshot_id: str) -> None:
        """Owe the copy, unless it is known to be there."""
        with self._wake:
            known = snapshot_id in self._remembered(session_id).durable
        if not known:
            self._owe(session_id, snapshot_id)

    def pay(self) -> int:
        """Make the copies that are owed, oldest first, until a store fails; how many are left."""
        with self._paying:
            while (key := self._oldest()) is not None:
                try:
                    self._pay_one(*key)
                except StoreUnavailable:
                    self._count("durable_failures")
                    break
        return self.debt()

    def debt(self) -> int:
        """How many durable copies are owed."""
        with self._wake:
            return len(self._owed)

    def counts(self) -> Mapping[str, int]:
        """Since the start: hot_failures, hot_misses, put_back, durable_failures, paid, unpaid.

        `unpaid` are copies that were never made: beyond the limit, or deleted from the hot store
        before they could be.
        """
        with self._wake:
            return dict(self._counts)

    def _durable_instead(
        self, session_id: str, snapshot_id: str, blob: bytes, why: StoreUnavailable
    ) -> None:
        try:
            self._durable.put(session_id, snapshot_id, blob)
        except StoreUnavailable as error:
            self._count("durable_failures")
            raise error from why
        self._made(session_id, snapshot_id)

    def _pay_one(self, session_id: str, snapshot_id: str) -> None:
        key = (session_id, snapshot_id)
        with self._wake:
            self._in_hand, self._withdrawn = key, False
        try:
            blob = self._hot.get(session_id, snapshot_id)
            self._durable.put(session_id, snapshot_id, blob)
        except StoreUnavailable as error:
            if not isinstance(error, StoreCorrupt):
                raise
            self._forgive(key)
        except EchoError:
            # Deleted from the hot store, or over the durable one's limit: it will never be made.
            self._forgive(key)
        else:
            self._count("paid")
            self._made(session_id, snapshot_id)
        finally:
            with self._wake:
                withdrawn, self._in_hand = self._withdrawn, None
        if withdrawn:
            # It was deleted while it was copied.
            self._durable.delete(session_id, snapshot_id)
            with self._wake:
                self._remembered(session_id).durable.discard(snapshot_id)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._owed)
                closing = self._closing
            left = self.pay()
            if closing:
                return
            if left:
                with self._wake:
                    self._wake.wait_for(lambda: self._closing, self._retry_s)

    def _due(self, session_id: str) -> bool:
        with self._wake:
            known = self._remembered(session_id)
            known.puts += 1
            return (known.puts - 1) % self._durable_every == 0

    def _owe(self, session_id: str, snapshot_id: str) -> None:
        with self._wake:
            self._owed[session_id, snapshot_id] = None
            while len(self._owed) > self._debt_limit:
                self._owed.popitem(last=False)
                self._counts["unpaid"] += 1
            self._wake.notify_all()

    def _oldest(self) -> tuple[str, str] | None:
        with self._wake:
            return next(iter(self._owed), None)

    def _made(self, session_id: str, snapshot_id: str) -> None:
        with self._wake:
            self._owed.pop((session_id, snapshot_id), None)
            self._remembered(session_id).durable.add(snapshot_id)

    def _forgive(self, key: tuple[str, str]) -> None:
        with self._wake:
            self._owed.pop(key, None)
            self._counts["unpaid"] += 1

    def _withdraw(self, key: tuple[str, str]) -> None:
        self._owed.pop(key, None)
        if key == self._in_hand:
            self._withdrawn = True

    def _is_durable(self, session_id: str, snapshot_id: str) -> bool:
        with self._wake:
            if snapshot_id in self._remembered(session_id).durable:
                return True
        return snapshot_id in self._list_durable(session_id)

    def _list_durable(self, session_id: str) -> set[str]:
        held = {blob.snapshot_id for blob in self._durable.list_blobs(session_id)}
        with self._wake:
            self._remembered(session_id).durable |= held
        return held

    def _remembered(self, session_id: str) -> _Known:
        known = self._known.setdefault(session_id, _Known())
        self._known.move_to_end(session_id)
        if len(self._known) > _SESSIONS_REMEMBERED:
            self._known.popitem(last=False)
        return known

    def _count(self, what: str) -> None:
        with self._wake:
            self._counts[what] += 1
