"""What every session directory promises of sessions and their owners, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from fakes import FakeClock
from stored import new, owned, produce, ref

from echo_ray.errors import (
    Fenced,
    InvalidRequestError,
    SessionClosed,
    SessionExists,
    SessionNotFound,
)
from echo_ray.session.records import (
    ClipRef,
    Lease,
    OnIdle,
    Pace,
    SessionState,
)
from echo_ray.storage.interface import Directory

GHOST = Lease("ghost", "r1", 1)


# -- sessions


def test_a_session_comes_back_as_it_was_created(directory: Directory) -> None:
    record = new(
        prompt="ein Ball, \N{SNOWMAN}, \x00 and 'quotes'",
        seed=2**64 - 1,
        pace=Pace.MAX,
        on_idle=OnIdle.CLOSE,
        labels={"team": "a"},
        clip=ClipRef(id="clip-1", sha256="ab" * 32, frames=21),
        created_at=12.25,
        next_index=16,
        sealed=16,
        epoch=3,
        fingerprint="fp",
    )
    directory.create(record)
    assert directory.get("s1") == record


def test_list_is_oldest_first(directory: Directory) -> None:
    assert list(directory.list()) == []
    for id_, at in (("b", 2.0), ("c", 1.0), ("a", 2.0)):
        directory.create(new(id_, created_at=at))
    assert [r.id for r in directory.list()] == ["c", "b", "a"]


def test_create_refuses_a_taken_id(directory: Directory) -> None:
    directory.create(new())
    with pytest.raises(SessionExists, match="s1"):
        directory.create(new(prompt="other"))
    assert directory.get("s1").prompt == "a red ball"


@pytest.mark.parametrize(
    "changes",
    [
        {"sealed": 2},
        {"next_index": 3},
        {"next_index": -1},
        {"next_index": 2**60, "sealed": 2**60},
        {"epoch": 2**60},
        {"prompt": "\ud800"},
        {"id": "\udfff"},
        {"clip": ClipRef(id="\ud800", sha256="", frames=9)},
        {"clip": ClipRef(id="clip-1", sha256="\ud800", frames=9)},
        {"state": "asleep"},
    ],
)
def test_create_refuses_what_cannot_be_kept(
    directory: Directory, changes: dict[str, object]
) -> None:
    with pytest.raises(InvalidRequestError):
        directory.create(new(**changes))
    assert list(directory.list()) == []


def test_delete_forgets_everything(directory: Directory) -> None:
    lease = owned(directory)
    produce(directory, lease, 0)
    directory.append_control("s1", "e1", "blue")
    directory.add_snapshot(lease, ref())
    directory.delete("s1")
    assert list(directory.list()) == []
    with pytest.raises(SessionNotFound):
        directory.seal(lease, 1)
    assert directory.renew([lease], ttl_s=1) == [lease]
    directory.create(new())
    assert directory.digests("s1", 0, 9) == {}
    assert list(directory.controls("s1")) == []
    assert list(directory.snapshots("s1")) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda d: d.get("ghost"),
        lambda d: d.delete("ghost"),
        lambda d: d.claim("ghost", "r1", expect_epoch=0, ttl_s=1),
        lambda d: d.release(GHOST, state="live"),
        lambda d: d.set_state("ghost", state="paused"),
        lambda d: d.seal(GHOST, 0),
        lambda d: d.commit(GHOST, 0, "d", "fp"),
        lambda d: d.digests("ghost", 0, 1),
        lambda d: d.append_control("ghost", "e", "p"),
        lambda d: d.controls("ghost"),
        lambda d: d.add_snapshot(GHOST, ref(session="ghost")),
        lambda d: d.snapshots("ghost"),
        lambda d: d.pin_snapshot("ghost", "p8"),
        lambda d: d.drop_snapshot("ghost", "p8"),
    ],
)
def test_every_method_refuses_an_unknown_session(
    directory: Directory, call: Callable[[Directory], object]
) -> None:
    with pytest.raises(SessionNotFound, match="ghost"):
        call(directory)


# -- ownership


def test_claim_raises_the_epoch_and_sets_live(directory: Directory, clock: FakeClock) -> None:
    directory.create(new(state=SessionState.PAUSED))
    lease = directory.claim("s1", "r1", expect_epoch=0, ttl_s=1.5)
    assert lease == Lease("s1", "r1", 1)
    record = directory.get("s1")
    assert (record.owner, record.epoch, record.state) == ("r1", 1, SessionState.LIVE)
    assert record.lease_until == clock.wall() + 1.5


def test_a_claim_takes_the_session_from_a_living_owner(directory: Directory) -> None:
    owned(directory)
    assert directory.claim("s1", "r2", expect_epoch=1, ttl_s=1).epoch == 2
    assert directory.get("s1").owner == "r2"


@pytest.mark.parametrize("epoch", [0, 2, -1])
def test_claim_refuses_another_epoch(directory: Directory, epoch: int) -> None:
    owned(directory)
    before = directory.get("s1")
    with pytest.raises(Fenced, match=f"expects epoch {epoch}"):
        directory.claim("s1", "r2", expect_epoch=epoch, ttl_s=1)
    assert directory.get("s1") == before


def test_claim_refuses_a_closed_session(directory: Directory) -> None:
    directory.create(new())
    epoch = directory.set_state("s1", state="closed").epoch
    with pytest.raises(SessionClosed):
        directory.claim("s1", "r1", expect_epoch=epoch, ttl_s=1)


FENCED_WRITES: list[Callable[[Directory, Lease], object]] = [
    lambda d, lease: d.seal(lease, 1),
    lambda d, lease: d.commit(lease, 1, "d", "fp"),
    lambda d, lease: d.release(lease, state="paused"),
    lambda d, lease: d.add_snapshot(lease, ref()),
]


@pytest.mark.parametrize("write", FENCED_WRITES)
@pytest.mark.parametrize("loss", ["claimed", "paused", "closed", "released", "forged"])
def test_a_stale_lease_writes_nothing(
    directory: Directory, write: Callable[[Directory, Lease], object], loss: str
) -> None:
    lease = owned(directory)
    produce(directory, lease, 0)
    directory.seal(lease, 1)
    if loss == "claimed":
        directory.claim("s1", "r1", expect_epoch=1, ttl_s=1)
    elif loss == "released":
        directory.release(lease, state="live")
    elif loss == "forged":
        lease = replace(lease, owner="r9")
    else:
        directory.set_state("s1", state=loss)
    before = directory.get("s1")
    with pytest.raises(Fenced, match="stop writing"):
        write(directory, lease)
    assert directory.get("s1") == before
    assert list(directory.snapshots("s1")) == []
    assert directory.digests("s1", 0, 9) == {0: "digest-0"}
    assert directory.renew([lease], ttl_s=1) == [lease]


def test_renew_extends_and_names_the_lost(directory: Directory, clock: FakeClock) -> None:
    kept, taken, gone = (owned(directory, id_) for id_ in ("kept", "taken", "gone"))
    directory.claim("taken", "r2", expect_epoch=1, ttl_s=1.5)
    directory.delete("gone")
    clock.advance(1.0)
    assert list(directory.renew([gone, kept, taken], ttl_s=2.0)) == [gone, taken]
    assert directory.get("kept").lease_until == clock.wall() + 2.0
    assert directory.get("taken").lease_until == clock.wall() + 0.5
    assert list(directory.renew([], ttl_s=2.0)) == []


def test_a_lease_that_ran_out_can_be_renewed_until_somebody_claims(
    directory: Directory, clock: FakeClock
) -> None:
    lease = owned(directory)
    clock.advance(60)
    assert directory.get("s1").lease_until < clock.wall()
    assert list(directory.renew([lease], ttl_s=1)) == []
    assert directory.get("s1").lease_until == clock.wall() + 1


@pytest.mark.parametrize("state", ["live", "paused", "closed"])
def test_release_gives_the_session_up(directory: Directory, state: str) -> None:
    lease = owned(directory)
    directory.release(lease, state=state)
    record = directory.get("s1")
    assert (record.owner, record.lease_until, record.state) == (None, 0.0, state)


@pytest.mark.parametrize("state", ["paused", "closed"])
def test_pausing_and_closing_take_the_session_away(directory: Directory, state: str) -> None:
    owned(directory)
    record = directory.set_state("s1", state=state)
    assert record == directory.get("s1")
    assert (record.state, record.owner, record.epoch) == (state, None, 2)


def test_setting_live_leaves_the_owner(directory: Directory) -> None:
    lease = owned(directory)
    assert directory.set_state("s1", state="live").owner == "r1"
    assert list(directory.renew([lease], ttl_s=1)) == []
    paused = directory.set_state("s1", state="paused")
    assert directory.set_state("s1", state="live").epoch == paused.epoch


@pytest.mark.parametrize("state", ["live", "paused"])
def test_closed_is_for_ever(directory: Directory, state: str) -> None:
    directory.create(new())
    closed = directory.set_state("s1", state="closed")
    assert directory.set_state("s1", state="closed") == closed
    with pytest.raises(SessionClosed):
        directory.set_state("s1", state=state)
    assert directory.get("s1") == closed


def test_unknown_states_are_refused(directory: Directory) -> None:
    lease = owned(directory)
    before = directory.get("s1")
    with pytest.raises(InvalidRequestError, match="asleep"):
        directory.set_state("s1", state="asleep")
    with pytest.raises(InvalidRequestError, match="live, paused, closed"):
        directory.release(lease, state="asleep")
    assert directory.get("s1") == before
