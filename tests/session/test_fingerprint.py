"""Which engine may go on with a session, and where placement sends it."""

from __future__ import annotations

import pytest

from echo_ray.errors import NoReplica
from echo_ray.session import owner_events, owning
from echo_ray.session.fingerprint import Fit, NoFittingReplica, ResumePolicy, allows, fit, unfit
from echo_ray.session.lease import LeaseView
from echo_ray.session.moving import plan
from echo_ray.session.owning import Work
from echo_ray.session.placement import best_replica
from echo_ray.session.records import Lease, ReplicaRecord, SessionRecord, SessionState

EXACT, COMPATIBLE = ResumePolicy.EXACT, ResumePolicy.COMPATIBLE
HERE, OTHER, NEWER = "m/aa/cpu", "m/aa/gpu", "m/bb/cpu"


def replica(name: str, fingerprint: str = HERE, sessions: int = 0) -> ReplicaRecord:
    return ReplicaRecord(
        id=name,
        node_id="n",
        pid=1,
        address=f"{name}:1",
        model="m",
        fingerprint=fingerprint,
        sessions=tuple(f"{name}{n}" for n in range(sessions)),
    )


def chosen(*replicas: ReplicaRecord, policy: ResumePolicy, made_by: str | None = HERE) -> str:
    return best_replica(replicas, model="m", cap=8, made_by=made_by, policy=policy).id


@pytest.mark.parametrize(
    ("made_by", "engine", "found", "exact", "compatible"),
    [
        (HERE, HERE, Fit.SAME, True, True),
        (None, HERE, Fit.SAME, True, True),
        (HERE, "", Fit.SAME, True, True),
        (HERE, OTHER, Fit.OTHER_NUMERICS, False, True),
        (HERE, NEWER, Fit.OTHER_MODEL, False, False),
    ],
)
def test_the_same_bits_or_the_same_model(
    made_by: str | None, engine: str, found: Fit, exact: bool, compatible: bool
) -> None:
    assert fit(made_by, engine) is found
    assert (allows(EXACT, found), allows(COMPATIBLE, found)) == (exact, compatible)


def test_a_session_goes_where_the_same_bits_are_made_however_full_that_is() -> None:
    busy, idle = replica("a", sessions=5), replica("b", OTHER)
    for policy in (EXACT, COMPATIBLE):
        assert chosen(busy, idle, policy=policy) == "a"
    assert chosen(busy, idle, policy=EXACT, made_by=None) == "b"


def test_another_kind_of_device_goes_on_only_where_that_is_allowed() -> None:
    assert chosen(replica("b", OTHER), replica("c", NEWER), policy=COMPATIBLE) == "b"
    with pytest.raises(NoFittingReplica, match=r"m/aa/cpu, here runs m/aa/gpu.*set compatible"):
        chosen(replica("b", OTHER), replica("c", NEWER), policy=EXACT)


@pytest.mark.parametrize("policy", list(ResumePolicy))
def test_another_model_or_code_is_refused_under_both(policy: ResumePolicy) -> None:
    with pytest.raises(NoFittingReplica, match="run the release that made it") as refusal:
        chosen(replica("c", NEWER), policy=policy)
    error = refusal.value
    assert (error.code, error.retryable, error.http_status) == ("no_replica", True, 503)
    assert error.retry_after_s == 10.0


def test_without_any_replica_the_fingerprint_is_not_to_blame() -> None:
    with pytest.raises(NoReplica) as refusal:
        chosen(policy=EXACT)
    assert not isinstance(refusal.value, NoFittingReplica)


def test_a_move_to_a_replica_that_does_not_fit_is_refused() -> None:
    record = SessionRecord(id="s", model="m", prompt="p", seed=1, owner="a", fingerprint=HERE)
    replicas = (replica("a"), replica("b", OTHER))
    for to in ("b", None):
        with pytest.raises(NoFittingReplica):
            plan(record, replicas, to, cap=8)
        move = plan(record, replicas, to, cap=8, policy=COMPATIBLE)
        assert move is not None
        assert move.target.id == "b"


def test_an_owner_that_does_not_fit_gives_the_session_back_and_a_shadow_goes() -> None:
    record = SessionRecord(id="s", model="m", prompt="p", seed=1, next_index=9, fingerprint=HERE)
    lease = LeaseView(Lease("s", "b", 1), 1.5, 0.0)
    error = unfit(HERE, NEWER)
    o, _ = owner_events.failed(owning.started(record, lease, 0.0), error, lease, 0.0)
    assert (owning.work(o), o.release_as) == (Work.RELEASE, SessionState.LIVE)
    o, _ = owner_events.ended(o, NoReplica("released"))
    assert o.ended is error
    o, _ = owner_events.failed(owning.started(record, None, 0.0), error, None, 0.0)
    assert o.ended is error
