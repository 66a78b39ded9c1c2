"""Which replica a session goes to: the one with the most free slack.

Decides from what replicas say of themselves; knows nothing about sockets or directories.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence

from echo_ray.errors import CapacityError, InvalidRequestError, NoReplica
from echo_ray.session.fingerprint import Fit, ResumePolicy, allows, fit, unfit
from echo_ray.session.records import Pace, ReplicaRecord

RETRY_NO_REPLICA_S = 2.0
RETRY_FULL_S = 5.0


def best_replica(
    replicas: Sequence[ReplicaRecord],
    *,
    model: str,
    cap: int,
    made_by: str | None = None,
    policy: ResumePolicy = ResumePolicy.EXACT,
    avoid: Collection[str] = (),
    suspects: Collection[str] = (),
    pending: Mapping[str, int] | None = None,
) -> ReplicaRecord:
    """The ready replica with the most slack; ties go to the emptiest, then to the first given.

    A session that exists already is placed even where no slack is left, up to `cap` sessions: late
    is better than lost. `avoid` is never chosen; `suspects`, which failed somebody a moment ago but
    still say that they live, only when nobody else has room. `pending` counts sessions sent to a
    replica since it last spoke. `made_by` is the fingerprint of the session's last chunk: `policy`
    says which engines may go on from there, and those that make the same bits come first. Raises
    `NoReplica` when none is eligible (`NoFittingReplica`: for want of a fitting engine) and
    `CapacityError` when all eligible ones are at the cap.
    """
    sent = pending or {}
    eligible = fitting(_eligible(replicas, model, avoid), made_by, policy)
    open_ones = [r for r in eligible if len(r.sessions) + sent.get(r.id, 0) < cap]
    if not open_ones:
        raise _full(eligible, f"limits.sessions_per_replica is {cap}")
    return min(
        open_ones,
        key=lambda r: (
            r.id in suspects,
            fit(made_by, r.fingerprint) is not Fit.SAME,
            -slack(r, cap, sent),
            len(r.sessions) + sent.get(r.id, 0),
        ),
    )


def fitting(
    replicas: Sequence[ReplicaRecord], made_by: str | None, policy: ResumePolicy
) -> list[ReplicaRecord]:
    """Those that may go on with what `made_by` made. Raises `NoFittingReplica` if none may."""
    found = [r for r in replicas if allows(policy, fit(made_by, r.fingerprint))]
    if made_by and replicas and not found:
        # The nearest one names the smallest difference.
        near = min(replicas, key=lambda r: (fit(made_by, r.fingerprint).value, r.id))
        raise unfit(made_by, near.fingerprint)
    return found


def admit(
    replicas: Sequence[ReplicaRecord],
    *,
    model: str,
    pace: Pace,
    cap: int,
    pending: Mapping[str, int] | None = None,
) -> None:
    """Refuse a new session that no replica has room for.

    A realtime session needs measured slack; one at `pace: max` takes what the others leave, so only
    the cap bounds it. Raises `NoReplica` or `CapacityError`, both with a time to retry after.
    """
    sent = pending or {}
    eligible = _eligible(replicas, model, ())
    room = [r for r in eligible if len(r.sessions) + sent.get(r.id, 0) < cap]
    if pace is Pace.REALTIME:
        room = [r for r in room if slack(r, cap, sent) > 0]
    if not room:
        raise _full(eligible, "their chunk time leaves no slack")


def slack(replica: ReplicaRecord, cap: int, pending: Mapping[str, int]) -> int:
    """How many more realtime sessions a replica has room for, by its own measure and the cap."""
    sent = pending.get(replica.id, 0)
    by_cap = cap - len(replica.sessions) - sent
    if replica.chunk_seconds <= 0:
        return by_cap
    return min(by_cap, replica.free_slots - sent)


def sampled(
    replicas: Sequence[ReplicaRecord],
    among: int | None,
    named: Collection[str],
    rng: random.Random,
) -> list[ReplicaRecord]:
    """At most `among` of them (None: all), chosen at random, and the named ones; in their order.

    Raises `InvalidRequestError` for `among` below 1.
    """
    check_among(among)
    if among is None or among >= len(replicas):
        return list(replicas)
    kept = {r.id for r in rng.sample(replicas, among)}
    return [r for r in replicas if r.id in kept or r.id in named]


def check_among(among: int | None) -> None:
    """Refuse a sample of less than one replica, with `InvalidRequestError`."""
    if among is not None and among < 1:
        raise InvalidRequestError(
            f"among is {among}; ask for at least 1 replica, or for all of them (None)"
        )


def _eligible(
    replicas: Sequence[ReplicaRecord], model: str, avoid: Collection[str]
) -> list[ReplicaRecord]:
    serving = [r for r in replicas if r.state == "ready" and r.model in ("", model)]
    eligible = [r for r in serving if r.id not in avoid]
    if not eligible:
        raise NoReplica(
            f"no replica is ready for model {model!r} ({len(replicas)} live, {len(serving)} ready, "
            f"{len(serving)} of these not wanted); retry in {RETRY_NO_REPLICA_S:g} s",
            retry_after_s=RETRY_NO_REPLICA_S,
        )
    return eligible


def _full(eligible: Sequence[ReplicaRecord], why: str) -> CapacityError:
    return CapacityError(
        f"all {len(eligible)} ready replicas are full ({why}); retry in {RETRY_FULL_S:g} s",
        retry_after_s=RETRY_FULL_S,
    )
