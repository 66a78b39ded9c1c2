"""A replica over a tiered store: which snapshots stay, which become durable, and who waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from fakes import FakeEngine
from replicas import LIMIT_S, Replicas, Unreliable, eventually, watch

from echo_ray.errors import StoreUnavailable
from echo_ray.serve.telemetry import Telemetry
from echo_ray.serve.tier_accounts import TierAccounts
from echo_ray.session.draining import Reason
from echo_ray.session.records import SessionState
from echo_ray.session.sweep import StoredBlob
from echo_ray.storage.memory import MemorySnapshots
from echo_ray.storage.tiered import TieredSnapshots


class Durable(MemorySnapshots):
    """A durable store that answers nothing while `gate` is closed, and fails while it is `down`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.down = False
        self.closed = False

    def _pass(self) -> None:
        assert self.gate.wait(50)
        if self.down:
            raise StoreUnavailable("down, as told by a test")

    def put(self, session_id: str, snapshot_id: str, blob: bytes) -> None:
        self._pass()
        super().put(session_id, snapshot_id, blob)

    def delete(self, session_id: str, snapshot_id: str) -> None:
        self._pass()
        super().delete(session_id, snapshot_id)

    def list_blobs(self, session_id: str | None = None) -> Iterator[StoredBlob]:
        self._pass()
        return super().list_blobs(session_id)

    def close(self) -> None:
        self.closed = True


class Bench(Replicas):
    """A replica with a snapshot at every second chunk, the first durable and then no other."""

    def __init__(self, **session: float) -> None:
        super().__init__(**{"snapshots_kept": 2, **session})
        self.durable = Durable()
        self.store = TieredSnapshots(self.snapshots, self.durable, durable_every=1000)
        self.store.start()
        self.unreliable = Unreliable(self.directory)
        self.one = self.start(
            "r1",
            FakeEngine(point_every=2),
            store=self.store,
            directory=lambda: self.unreliable,
        )
        self.session()

    def leave(self) -> None:
        """Nobody watches any more."""
        self.idle(self.one)

    def watch(self, epoch: int, start: int, stop: int) -> None:
        """Make chunks up to `stop`, waiting for each of their snapshots."""
        for index in range(start, stop, 2):
            asyncio.run(watch(self.one, epoch, index, 2))
            assert eventually(lambda n=index + 2: n == self.points[0])

    @property
    def points(self) -> list[int]:
        return [s.chunk_index for s in self.directory.snapshots("s1")] or [0]

    def durable_points(self) -> list[int]:
        ids = {blob.snapshot_id for blob in MemorySnapshots.list_blobs(self.durable)}
        return [s.chunk_index for s in self.directory.snapshots("s1") if s.id in ids]

    def errors(self, op: str) -> float:
        return self.one.telemetry.value("echo_ray_store_errors_total", op=op)


def test_pruning_spares_the_newest_durable_snapshot() -> None:
    with Bench() as bench:
        epoch = bench.claim(bench.one)
        bench.watch(epoch, 0, 2)
        assert eventually(lambda: bench.durable_points() == [2])
        bench.watch(epoch, 2, 10)
        assert eventually(lambda: bench.points == [10, 8, 2])
        newest = bench.directory.snapshots("s1")[0]
        bench.store.make_durable("s1", newest.id)
        bench.watch(epoch, 10, 12)
        assert eventually(lambda: bench.points == [12, 10])
        assert bench.durable_points() == [10]


def test_what_cannot_be_known_to_be_less_durable_is_not_pruned() -> None:
    with Bench() as bench:
        bench.durable.down = True
        epoch = bench.claim(bench.one)
        bench.watch(epoch, 0, 8)
        assert eventually(lambda: bench.errors("prune") >= 1)
        assert bench.points == [8, 6, 4, 2]
        bench.durable.down = False
        assert bench.store.pay() == 0
        bench.watch(epoch, 8, 10)
        assert eventually(lambda: bench.points == [10, 8, 2])


def test_a_durable_store_that_hangs_delays_no_snapshot_and_no_release() -> None:
    with Bench() as bench:
        bench.durable.gate.clear()
        try:
            bench.watch(bench.claim(bench.one), 0, 10)
            bench.leave()
            paused = lambda: bench.directory.get("s1").state is SessionState.PAUSED  # noqa: E731
            assert eventually(paused)
            assert bench.store.debt() >= 1
            writer = bench.one.host._bench.writer
            stopping = threading.Thread(target=writer.stop, args=(LIMIT_S,))
            stopping.start()
            # What prunes waits for the store; what writes and releases has ended.
            assert eventually(lambda: not writer._thread.is_alive())
        finally:
            bench.durable.gate.set()
        stopping.join()
        assert eventually(lambda: 10 in bench.durable_points())


def test_a_session_that_pauses_rests_on_a_durable_snapshot() -> None:
    with Bench() as bench:
        bench.watch(bench.claim(bench.one), 0, 6)
        bench.leave()
        assert eventually(lambda: bench.directory.get("s1").state is SessionState.PAUSED)
        assert eventually(lambda: 6 in bench.durable_points())


def test_a_session_that_a_drain_gives_up_rests_on_a_durable_snapshot() -> None:
    with Bench() as bench:
        bench.watch(bench.claim(bench.one), 0, 6)
        assert eventually(lambda: bench.durable_points() == [2])
        bench.one.host.drain(Reason.ADMIN, 0.0)
        assert eventually(lambda: bench.directory.get("s1").owner is None)
        assert bench.directory.get("s1").state is SessionState.LIVE
        assert eventually(lambda: 6 in bench.durable_points())


def test_a_directory_that_fails_after_the_release_undoes_nothing() -> None:
    with Bench() as bench:
        bench.watch(bench.claim(bench.one), 0, 2)
        bench.unreliable.failures["snapshots"] = [StoreUnavailable("gone for now")] * 9
        bench.leave()
        assert eventually(lambda: bench.errors("durable") == 1)
        assert bench.directory.get("s1").state is SessionState.PAUSED
        assert bench.errors("release") == 0
        assert eventually(lambda: bench.one.host.runners() == [])


def test_the_debt_and_what_happens_between_the_tiers_are_metrics() -> None:
    with Bench() as bench:
        bench.durable.down = True
        epoch = bench.claim(bench.one)
        bench.watch(epoch, 0, 2)
        value = bench.one.telemetry.value
        failed = ("echo_ray_snapshot_tier_events_total", "durable_failures")
        assert eventually(lambda: value("echo_ray_snapshot_debt") == 1)
        assert eventually(lambda: value(failed[0], event=failed[1]) >= 1)
        bench.durable.down = False
        bench.store.pay()
        assert eventually(lambda: value("echo_ray_snapshot_debt") == 0)
        assert eventually(lambda: value(failed[0], event="paid") == 1)


def test_what_was_counted_is_not_counted_again() -> None:
    telemetry, store = Telemetry(), TieredSnapshots(MemorySnapshots(), Durable(), durable_every=1)
    accounts = TierAccounts(store, telemetry)
    for session, told in (("s1", 1), ("s2", 2)):
        store.put(session, "p0", b"x")
        store.pay()
        for _ in range(2):
            accounts.tell()
            assert telemetry.value("echo_ray_snapshot_tier_events_total", event="paid") == told


def test_a_replica_that_closes_closes_its_store_last() -> None:
    with Bench() as bench:
        bench.watch(bench.claim(bench.one), 0, 2)
        writer = bench.one.host._bench.writer
        ended: list[bool] = []
        closing = bench.store.close
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                bench.store,
                "close",
                lambda: (ended.append(not writer._thread.is_alive()), closing()),
            )
            bench.one.close(LIMIT_S)
        assert ended == [True]
        assert bench.durable.closed
        assert eventually(lambda: bench.durable_points() == [2])
