"""A hot store in front of a durable one: what goes where, with either of them up or down."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from fakes import FakeClock

from echo_ray.errors import (
    CapacityError,
    ConfigError,
    EchoError,
    SnapshotNotFound,
    StoreCorrupt,
    StoreFull,
    StoreUnavailable,
)
from echo_ray.storage.memory import MemorySnapshots
from echo_ray.storage.tiered import TieredSnapshots


class Tier(MemorySnapshots):
    """A store in memory that fails with `down` while that is set."""

    def __init__(self, name: str, limit_bytes: int = 2**20) -> None:
        super().__init__(limit_bytes, FakeClock())
        self.name = name
        self.down: EchoError | None = None
        self.calls: list[str] = []
        self.before_put: Callable[[], object] = lambda: None

    def _enter(self, call: str) -> None:
        self.calls.append(call)
        if self.down is not None:
            raise self.down

    def put(self, session_id: str, snapshot_id: str, blob: bytes) -> None:
        self.before_put()
        self._enter("put")
        super().put(session_id, snapshot_id, blob)

    def get(self, session_id: str, snapshot_id: str) -> bytes:
        self._enter("get")
        return super().get(session_id, snapshot_id)

    def delete(self, session_id: str, snapshot_id: str) -> None:
        self._enter("delete")
        super().delete(session_id, snapshot_id)

    def delete_session(self, session_id: str) -> None:
        self._enter("delete_session")
        super().delete_session(session_id)

    def list_blobs(self, session_id: str | None = None):  # type: ignore[no-untyped-def]
        self._enter("list")
        return super().list_blobs(session_id)

    @property
    def held(self) -> set[str]:
        return {b.snapshot_id for b in MemorySnapshots.list_blobs(self)}


DOWN = StoreUnavailable("down, as told by a test")


class Tiers:
    def __init__(self, **settings: int) -> None:
        self.hot, self.durable = Tier("hot"), Tier("durable")
        self.store = TieredSnapshots(self.hot, self.durable, **{"durable_every": 3, **settings})

    def put(self, *ids: str) -> None:
        for id_ in ids:
            self.store.put("s1", id_, id_.encode())


@pytest.fixture
def tiers() -> Tiers:
    return Tiers()


def test_the_first_and_every_nth_become_durable(tiers: Tiers) -> None:
    tiers.put("p0", "p1", "p2", "p3", "p4", "p5", "p6")
    assert tiers.durable.held == set()
    assert (tiers.store.debt(), tiers.store.pay()) == (3, 0)
    assert tiers.durable.held == {"p0", "p3", "p6"}
    tiers.store.put("s2", "clip", b"of another session")
    tiers.store.pay()
    assert tiers.store.where("s2", "clip") == ("hot", "durable")
    assert tiers.store.where("s1", "p1") == ("hot",)
    assert tiers.store.where("s1", "ghost") == ()


def test_what_must_be_durable_is_so_when_the_call_returns(tiers: Tiers) -> None:
    tiers.put("p0", "p1")
    tiers.store.make_durable("s1", "p1")
    assert tiers.durable.get("s1", "p1") == b"p1"
    tiers.durable.calls.clear()
    tiers.store.make_durable("s1", "p1")
    assert tiers.durable.calls == []
    with pytest.raises(SnapshotNotFound, match="ghost"):
        tiers.store.make_durable("s1", "ghost")


def test_making_durable_pays_the_debt(tiers: Tiers) -> None:
    tiers.put("p0")
    tiers.store.make_durable("s1", "p0")
    assert tiers.store.debt() == 0


def test_durable_is_found_without_the_hot_store(tiers: Tiers) -> None:
    tiers.durable.put("s1", "p0", b"x")
    tiers.hot.down = DOWN
    tiers.store.make_durable("s1", "p0")


def test_reading_is_hot_first(tiers: Tiers) -> None:
    tiers.put("p0")
    tiers.store.pay()
    tiers.durable.down = DOWN
    tiers.durable.calls.clear()
    assert tiers.store.get("s1", "p0") == b"p0"
    assert tiers.durable.calls == []


@pytest.mark.parametrize("damage", [None, StoreCorrupt("damaged")])
def test_what_the_hot_store_lost_comes_back_into_it(
    tiers: Tiers, damage: EchoError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers.put("p0")
    tiers.store.pay()
    tiers.hot.delete_session("s1")
    if damage is not None:

        def get(session_id: str, snapshot_id: str) -> bytes:
            raise damage

        monkeypatch.setattr(tiers.hot, "get", get)
    assert tiers.store.get("s1", "p0") == b"p0"
    assert tiers.hot.held == {"p0"}
    assert tiers.store.counts()["put_back"] == 1
    assert tiers.store.counts()["hot_failures" if damage else "hot_misses"] == 1


def test_a_hot_store_without_room_hinders_no_reading(tiers: Tiers) -> None:
    tiers.durable.put("s1", "p0", b"x")

    def full() -> None:
        raise StoreFull("no room")

    tiers.hot.before_put = full
    assert tiers.store.get("s1", "p0") == b"x"
    assert "put_back" not in tiers.store.counts()


@pytest.mark.parametrize("hot", ["has it", "lacks it", "down"])
@pytest.mark.parametrize("durable", ["has it", "lacks it", "down"])
def test_reading_in_every_combination(tiers: Tiers, hot: str, durable: str) -> None:
    for tier, state in ((tiers.hot, hot), (tiers.durable, durable)):
        if state == "has it":
            tier.put("s1", "p0", b"x")
        tier.down = DOWN if state == "down" else None
    if "has it" in (hot, durable):
        assert tiers.store.get("s1", "p0") == b"x"
    elif "down" in (hot, durable):
        with pytest.raises(StoreUnavailable):
            tiers.store.get("s1", "p0")
    else:
        with pytest.raises(SnapshotNotFound):
            tiers.store.get("s1", "p0")


@pytest.mark.parametrize("failure", [DOWN, StoreFull("no memory")])
def test_writes_go_to_the_durable_store_while_the_hot_one_is_down(
    tiers: Tiers, failure: EchoError
) -> None:
    tiers.hot.down = failure
    tiers.put("p0", "p1")
    assert tiers.durable.held == {"p0", "p1"}
    assert tiers.store.get("s1", "p1") == b"p1"
    assert tiers.store.counts()["hot_failures"] == 3
    assert tiers.store.debt() == 0
    tiers.hot.down = None
    assert tiers.store.get("s1", "p1") == b"p1"
    assert tiers.hot.held == {"p1"}


def test_with_both_down_nothing_is_said_to_be_stored(tiers: Tiers) -> None:
    tiers.hot.down, tiers.durable.down = DOWN, StoreFull("no room")
    with pytest.raises(StoreFull, match="no room"):
        tiers.put("p0")
    assert tiers.hot.held | tiers.durable.held == set()


def test_a_debt_is_paid_when_the_durable_store_is_back(tiers: Tiers) -> None:
    tiers.durable.down = DOWN
    tiers.put("p0", "p1", "p2", "p3")
    assert tiers.store.pay() == 2
    with pytest.raises(StoreUnavailable, match="as told by a test"):
        tiers.store.make_durable("s1", "p1")
    assert tiers.store.debt() == 3
    tiers.durable.down = None
    assert tiers.store.pay() == 0
    assert tiers.durable.held == {"p0", "p1", "p3"}
    assert tiers.store.counts()["paid"] == 3


def test_a_debt_that_can_never_be_paid_holds_up_no_other(tiers: Tiers) -> None:
    tiers.durable._limit_bytes = 4
    for session, blob in (("s1", b"gone"), ("s2", b"too large"), ("s3", b"fine")):
        tiers.store.put(session, "p0", blob)
    tiers.hot.delete("s1", "p0")
    assert tiers.store.pay() == 0
    assert tiers.durable.get("s3", "p0") == b"fine"
    assert tiers.store.counts()["unpaid"] == 2


def test_a_damaged_blob_is_not_copied_and_holds_up_no_other(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiers.hot.get

    def get(session_id: str, snapshot_id: str) -> bytes:
        if session_id == "s1":
            raise StoreCorrupt("damaged")
        return plain(session_id, snapshot_id)

    monkeypatch.setattr(tiers.hot, "get", get)
    tiers.store.put("s1", "p0", b"x")
    tiers.store.put("s2", "p0", b"fine")
    assert tiers.store.pay() == 0
    assert [b.session_id for b in tiers.durable.list_blobs()] == ["s2"]


def test_debts_are_bounded_and_the_oldest_are_forgotten() -> None:
    tiers = Tiers(durable_every=1, debt_limit=2)
    tiers.put("p0", "p1", "p2")
    assert (tiers.store.debt(), tiers.store.counts()["unpaid"]) == (2, 1)
    tiers.store.pay()
    assert tiers.durable.held == {"p1", "p2"}


@pytest.mark.parametrize("whole_session", [False, True])
def test_what_is_deleted_while_it_is_copied_stays_deleted(
    tiers: Tiers, whole_session: bool
) -> None:
    tiers.put("p0")

    def delete() -> None:
        if whole_session:
            tiers.store.delete_session("s1")
        else:
            tiers.store.delete("s1", "p0")

    tiers.durable.before_put = delete
    assert tiers.store.pay() == 0
    assert tiers.hot.held | tiers.durable.held == set()
    assert tiers.store.newest_durable("s1", ["p0"]) is None


@pytest.mark.parametrize("down", ["hot", "durable"])
def test_deleting_with_one_down_deletes_the_other_and_says_so(tiers: Tiers, down: str) -> None:
    other = tiers.durable if down == "hot" else tiers.hot
    for delete in (
        lambda: tiers.store.delete("s1", "p0"),
        lambda: tiers.store.delete_session("s1"),
    ):
        tiers.hot.down = tiers.durable.down = None
        tiers.put("p0")
        tiers.store.make_durable("s1", "p0")
        tiers.store.tiers[down].down = DOWN  # type: ignore[attr-defined]
        with pytest.raises(StoreUnavailable):
            delete()
        assert other.held == set()


def test_a_blob_over_the_limit_goes_nowhere(tiers: Tiers) -> None:
    with pytest.raises(CapacityError):
        tiers.store.put("s1", "p0", bytes(2**20 + 1))
    assert tiers.hot.held | tiers.durable.held == set()


def test_the_newest_durable_one_is_so_whoever_made_it(tiers: Tiers) -> None:
    tiers.durable.put("s1", "p3", b"by another process")
    assert tiers.store.newest_durable("s1", ["p5", "p4", "p3"]) == "p3"
    assert tiers.store.newest_durable("s1", ["p9"]) is None
    tiers.durable.put("s1", "p9", b"by another process")
    assert tiers.store.newest_durable("s1", ["p9", "p3"]) == "p9"
    tiers.store.delete("s1", "p9")
    assert tiers.store.newest_durable("s1", ["p9", "p3"]) == "p3"


def test_while_the_durable_store_is_down_what_was_seen_in_it_counts(tiers: Tiers) -> None:
    tiers.put("p0")
    tiers.store.pay()
    tiers.durable.down = DOWN
    assert tiers.store.newest_durable("s1", ["p1", "p0"]) == "p0"
    for session, ids in (("s1", ["p2", "p1"]), ("s2", ["p0"])):
        with pytest.raises(StoreUnavailable, match="as told by a test"):
            tiers.store.newest_durable(session, ids)


def test_durable_soon_is_a_debt_and_asks_nobody(tiers: Tiers) -> None:
    tiers.put("p0", "p1")
    tiers.store.pay()
    tiers.hot.down = tiers.durable.down = DOWN
    tiers.store.make_durable_soon("s1", "p0")
    assert tiers.store.debt() == 0
    tiers.store.make_durable_soon("s1", "p1")
    assert tiers.store.debt() == 1
    tiers.hot.down = tiers.durable.down = None
    assert tiers.store.pay() == 0
    assert tiers.durable.held == {"p0", "p1"}


def test_closing_closes_both(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    for tier in (tiers.hot, tiers.durable):
        monkeypatch.setattr(tier, "close", lambda tier=tier: closed.append(tier.name))
    tiers.store.start()
    tiers.put("p0")
    tiers.store.close()
    assert closed == ["hot", "durable"]
    assert tiers.durable.held == {"p0"}


def test_what_is_remembered_of_sessions_is_bounded(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("echo_ray.storage.tiered._SESSIONS_REMEMBERED", 2)
    for session in ("s1", "s2", "s3"):
        tiers.store.put(session, "p0", b"x")
    assert list(tiers.store._known) == ["s2", "s3"]


def test_each_blob_is_listed_once(tiers: Tiers) -> None:
    tiers.put("p0", "p1")
    tiers.store.pay()
    tiers.durable.put("s1", "old", b"x")
    assert sorted(b.snapshot_id for b in tiers.store.list_blobs()) == ["old", "p0", "p1"]


def test_a_thread_pays_and_ends(tiers: Tiers) -> None:
    stored = threading.Event()
    tiers.durable.before_put = stored.set
    tiers.store.start()
    tiers.put("p0")
    assert stored.wait(50)
    tiers.store.close()
    assert tiers.durable.held == {"p0"}
    assert not tiers.store._thread.is_alive()  # type: ignore[union-attr]


def test_the_thread_tries_again_and_once_more_at_the_end() -> None:
    tiers = Tiers()
    tiers.store._retry_s = 0.01
    tiers.durable.down = DOWN
    tries = [threading.Event() for _ in range(3)]
    rest = iter(tries)
    tiers.durable.before_put = lambda: next(rest, tries[-1]).set()
    tiers.store.start()
    tiers.put("p0")
    assert all(t.wait(50) for t in tries)
    tiers.store._retry_s = 60.0
    tiers.durable.down = None
    tiers.store.close()
    assert tiers.durable.held == {"p0"}


@pytest.mark.parametrize(
    "settings", [{"durable_every": 0}, {"debt_limit": 0}, {"retry_s": 0.0}, {"retry_s": -1.0}]
)
def test_settings_that_cannot_be(settings: dict[str, float]) -> None:
    name, value = next(iter(settings.items()))
    with pytest.raises(ConfigError, match=f"{name} is {value}; it must be"):
        TieredSnapshots(Tier("hot"), Tier("durable"), **settings)  # type: ignore[arg-type]
