"""The reader's machine alone: whom it reads from, what it delivers, and when it tries again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from echo_ray.errors import (
    CapacityError,
    ClipLost,
    Draining,
    EchoError,
    EngineError,
    Fenced,
    NoReplica,
    PromptError,
    SegmentExpired,
    SessionClosed,
    SessionNotFound,
    UnavailableError,
)
from echo_ray.session import pull_events as on
from echo_ray.session.locating import Ask, Owner, SessionPaused
from echo_ray.session.pull_events import (
    Disconnect,
    Failover,
    Lost,
    Recovered,
    TellPaused,
    TellTrouble,
)
from echo_ray.session.pulling import (
    Cause,
    End,
    Find,
    OwnerLost,
    Pulling,
    Read,
    Rest,
    Shun,
    takes,
    work,
)

OWNER = Owner("s1", "a", "a:1", 3)
NEXT = Owner("s1", "b", "b:1", 4)
BROKE = OwnerLost("broke: it")
TERMINAL = [
    SessionClosed("closed"),
    SessionNotFound("deleted"),
    SegmentExpired("gone"),
    ClipLost("gone"),
    PromptError("refused"),
]


def new() -> Pulling:
    return Pulling(next=5, told_s=0.0, beat_s=0.25, silence_s=1.0, patience_s=30.0)


def reading(owner: Owner = OWNER) -> Pulling:
    p, _ = on.found(on.finding(new())[0], owner)
    return p


def after(p: Pulling, now_s: float = 1.0) -> Find | Read | Rest | End:
    return work(p, now_s, wake=False)


def ask(p: Pulling, now_s: float = 1.0) -> Ask:
    found = after(p, now_s)
    assert isinstance(found, Find)
    return found.ask


def test_an_owner_is_found_and_read_from_at_the_next_index() -> None:
    p = new()
    assert work(p, 0.0, wake=True) == Find(Ask(wake=True, avoid=frozenset()))
    assert not ask(p).wake
    p, effects = on.found(on.finding(p)[0], OWNER)
    assert not effects
    assert after(p) == Read(OWNER, 5)
    p, effects = on.delivered(p, 5, 1.0)
    assert not effects
    assert after(p) == Read(OWNER, 6)


def test_segments_are_delivered_one_by_one_and_each_once() -> None:
    p = reading()
    assert takes(p, 5)
    assert not takes(p, 4)
    assert not takes(p, 0)
    p, _ = on.delivered(p, 5, 1.0)
    assert not takes(p, 5)
    assert takes(p, 6)


def test_a_session_that_was_brought_back_is_read_from_where_it_stands() -> None:
    p = reading(Owner("s1", "a", "a:1", 3, next_index=2))
    assert after(p) == Read(OWNER, 2)
    assert [takes(p, n) for n in (2, 3, 4, 5)] == [False, False, False, True]
    assert after(reading(Owner("s1", "a", "a:1", 3, next_index=9))) == Read(OWNER, 5)


@pytest.mark.parametrize("index", [6, -1, None, "5", 5.0])
def test_a_gap_or_no_index_at_all_is_refused(index: object) -> None:
    with pytest.raises(OwnerLost, match="where 5 was due"):
        takes(reading(), index)


def test_a_lost_owner_is_replaced_at_once_and_reading_goes_on_where_it_was() -> None:
    p, _ = on.delivered(reading(), 5, 0.5)
    p, effects = on.lost(p, BROKE, 1.0, 1.0)
    assert effects == (Lost(OWNER, "broke: it", avoid=True), Failover(Cause.BROKEN))
    assert ask(p) == Ask(failed=OWNER, last_epoch=3, wake=False, avoid=frozenset())
    p, _ = on.found(p, NEXT)
    assert after(p) == Read(NEXT, 6)
    p, effects = on.delivered(p, 6, 1.75)
    assert effects == (Recovered(0.75),)
    assert on.delivered(p, 7, 2.0)[1] == ()


def test_losses_in_a_row_are_one_failover_and_wait_ever_longer() -> None:
    p = reading()
    waits = []
    for i in range(8):
        p, effects = on.lost(p, BROKE, 1.0, 1.0)
        assert (Failover(Cause.BROKEN) in effects) == (i == 0)
        rest = after(p)
        waits.append(rest.until_s - 1.0 if isinstance(rest, Rest) else 0.0)
        assert isinstance(after(p, 2.0), Find), "no wait is longer than a second"
        p, _ = on.found(p, OWNER)
    assert waits == pytest.approx([0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    p, _ = on.delivered(p, 5, 1.0)
    p, _ = on.lost(p, BROKE, 1.0, 1.0)
    assert isinstance(after(p), Find), "a delivery makes good what was before"


def test_a_wait_is_as_long_as_chance_says() -> None:
    p, _ = on.not_found(new(), NoReplica("none"), 1.0, 0.5)
    p, _ = on.not_found(p, NoReplica("none"), 1.0, 0.5)
    assert after(p) == Rest(1.025)
    assert isinstance(after(p, 1.025), Find)


@pytest.mark.parametrize(
    ("loss", "avoid", "shunned"),
    [
        (OwnerLost("going away", cause=Cause.DRAIN), True, set()),
        (OwnerLost("fenced", cause=Cause.FENCED, shun=Shun.NOBODY), False, set()),
        (OwnerLost("refused: full", shun=Shun.SESSION), False, {"a"}),
    ],
)
def test_who_avoids_the_replica_of_a_lost_owner(
    loss: OwnerLost, avoid: bool, shunned: set[str]
) -> None:
    p, effects = on.lost(reading(), loss, 1.0, 1.0)
    assert effects == (Lost(OWNER, loss.reason, avoid=avoid), Failover(loss.cause))
    assert ask(p, 3.9).avoid == shunned
    assert ask(p, 4.0).avoid == set()


@pytest.mark.parametrize(
    ("error", "shunned"),
    [
        (CapacityError("full"), {"a"}),
        (EngineError("broken"), {"a"}),
        (Draining("leaving"), {"a"}),
        (Fenced("taken"), set()),
    ],
)
def test_an_owner_that_refuses_is_left_for_another(error: EchoError, shunned: set[str]) -> None:
    p, effects = on.refused(reading(), error, 1.0, 1.0)
    # An owner whose session has gone to another one has not failed.
    cause = Cause.FENCED if isinstance(error, Fenced) else Cause.BROKEN
    assert effects[:2] == (
        Lost(OWNER, f"refused: {error.message}", avoid=False),
        Failover(cause),
    )
    assert ask(p).avoid == shunned


@pytest.mark.parametrize("error", TERMINAL)
def test_what_every_replica_would_say_ends_the_pull(error: EchoError) -> None:
    assert after(on.refused(reading(), error, 1.0, 1.0)[0]) == End(error)
    assert after(on.not_found(new(), error, 1.0, 1.0)[0]) == End(error)


def test_silence_is_a_loss_after_every_beat_of_it_passed_one_by_one() -> None:
    p = reading()
    for _ in range(3):
        p, effects = on.quiet(p, 9.0, 1.0)
        assert not effects
    p, _ = on.heard(p)
    for _ in range(3):
        p, effects = on.quiet(p, 9.0, 1.0)
    assert after(p) == Read(OWNER, 5)
    p, effects = on.quiet(p, 9.0, 1.0)
    assert effects == (Lost(OWNER, "silent for 1.0 s", avoid=True), Failover(Cause.SILENT))
    p, _ = on.found(p, NEXT)
    p, effects = on.quiet(p, 9.0, 1.0)
    assert not effects, "the next owner has all its beats"


def test_trouble_is_told_after_long_and_again_each_time_it_has_lasted_as_long() -> None:
    error = NoReplica("none")
    p, effects = on.not_found(new(), error, 29.9, 1.0)
    assert not effects
    p, effects = on.not_found(p, error, 30.0, 1.0)
    assert effects == (TellTrouble(error),)
    p, effects = on.not_found(p, error, 59.9, 1.0)
    assert not effects
    p, _ = on.found(p, OWNER)
    p, effects = on.lost(p, BROKE, 60.0, 1.0)
    told = effects[-1]
    assert isinstance(told, TellTrouble)
    assert isinstance(told.error, UnavailableError)
    assert told.error.message == "replica a: broke: it"
    p, _ = on.found(p, OWNER)
    p, _ = on.delivered(p, 5, 80.0)
    p, effects = on.refused(p, error, 109.0, 1.0)
    assert TellTrouble(error) not in effects, "a delivery ends the trouble"
    p, _ = on.found(p, OWNER)
    p, effects = on.refused(p, error, 110.0, 1.0)
    assert effects[-1] == TellTrouble(error), "in the owner's own words"


def test_a_paused_session_is_told_once_and_looked_at_from_time_to_time() -> None:
    p, _ = on.lost(reading(), BROKE, 1.0, 1.0)
    p, effects = on.not_found(p, SessionPaused(), 2.0, 1.0)
    assert effects == (TellPaused(),)
    assert after(p, 2.0) == Rest(2.5)
    assert ask(p, 2.5).failed is None
    p, effects = on.not_found(p, SessionPaused(), 40.0, 1.0)
    assert not effects
    p, effects = on.not_found(p, NoReplica("none"), 41.0, 1.0)
    assert not effects, "a pause is no trouble"
    p, _ = on.found(p, NEXT)
    p, effects = on.delivered(p, 5, 42.0)
    assert not effects, "nor a failover"
    p, _ = on.lost(p, BROKE, 43.0, 1.0)
    assert on.not_found(p, SessionPaused(), 44.0, 1.0)[1] == (TellPaused(),)


def test_a_poke_ends_reading_and_looks_again_without_blame() -> None:
    p, effects = on.poked(reading())
    assert effects == (Disconnect(),)
    assert ask(p) == Ask(failed=None, last_epoch=3, wake=False, avoid=frozenset())
    for step in (
        on.lost(p, BROKE, 1.0, 1.0),
        on.refused(p, EngineError("broken"), 1.0, 1.0),
        on.refused(p, SessionClosed("closed"), 1.0, 1.0),
    ):
        assert step == (p, ()), "what was cut off says nothing any more"


def test_a_poke_ends_a_rest() -> None:
    p, _ = on.not_found(new(), SessionPaused(), 1.0, 1.0)
    assert isinstance(after(p), Rest)
    p, effects = on.poked(p)
    assert not effects
    assert isinstance(after(p), Find)


def test_a_poke_while_an_owner_is_looked_for_means_another_look() -> None:
    begun, _ = on.finding(on.poked(new())[0])
    assert after(on.found(begun, OWNER)[0]) == Read(OWNER, 5), "it came before the look"
    p, effects = on.poked(begun)
    assert not effects
    assert ask(on.found(p, OWNER)[0]) == Ask(last_epoch=3, wake=False, avoid=frozenset())
    assert isinstance(after(on.not_found(p, SessionPaused(), 1.0, 1.0)[0]), Find)
    twice = replace(p, attempts=1)
    assert isinstance(after(on.not_found(twice, NoReplica("none"), 1.0, 1.0)[0]), Find)


def test_what_was_delivered_counts_though_a_poke_came_between() -> None:
    p, _ = on.poked(reading())
    p, _ = on.delivered(p, 5, 1.0)
    assert after(on.found(on.finding(p)[0], NEXT)[0]) == Read(NEXT, 6)
