"""Who generates a session, as a value: its owner if it has one, else the replica to claim it for.

    decide(record, replicas, ask, ...) -> Standing | Wait | Claim, or an error

Every claim is a compare-and-set on the epoch, so of two routers that decide the same only one wins;
the other looks again. What a router remembers of replicas is a value too. Knows nothing of stores.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from echo_ray.errors import NoReplica, SessionClosed
from echo_ray.session.fingerprint import Fit, ResumePolicy, fit
from echo_ray.session.placement import best_replica
from echo_ray.session.records import ReplicaRecord, SessionRecord, SessionState

AVOID_S = 3.0
"""A replica that failed a reader is this router's last choice for so long."""
PENDING_S = 2.0
"""A session counts against its replica for so long, until the replica counts it itself."""
JITTER_S = 0.04
LOOKS = 5
"""How often one search looks at a session that keeps changing hands."""
SAMPLE = 16
"""Among so many replicas, taken at random, one is chosen: enough that one of the emptiest fifth is
nearly always there, and few enough to cost the directory no more than the rest of a search. Reading
all of 2,000 overloads it when 5 % of them are lost, and routers that see the same replicas choose
the same (docs/scale.md)."""


class SessionPaused(Exception):
    """Somebody paused the session on purpose; it waits to be resumed. Never reaches a client."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Where a session is generated, and under which epoch."""

    session_id: str
    replica_id: str
    address: str
    epoch: int
    next_index: int | None = field(default=None, compare=False)
    """The session's next chunk when it was looked at, if it was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What a reader knows that looks for the session's owner."""

    failed: Owner | None = None
    """The owner that just failed it; while the record still names it, it counts as none."""
    last_epoch: int | None = None
    """The epoch followed so far. A session paused under it was paused for want of readers, and
    there is one."""
    wake: bool = True
    """Whether a session that anybody else paused is to be woken."""
    avoid: Collection[str] = ()
    """Replicas that refused this session; never chosen."""


# What a router remembers

Avoided = Mapping[str, float]
"""Replica id -> until when it is avoided, by the router's monotonic clock."""


def avoiding(avoided: Avoided, replica_id: str, now_s: float) -> Avoided:
    """One more replica to avoid for a while, without those whose time is over."""
    return {rid: until_s for rid, until_s in avoided.items() if until_s > now_s} | {
        replica_id: now_s + AVOID_S
    }


def avoided_at(avoided: Avoided, now_s: float) -> frozenset[str]:
    """The replicas to avoid at `now_s`."""
    return frozenset(rid for rid, until_s in avoided.items() if until_s > now_s)


@dataclass(frozen=True, slots=True)
class Memory:
    """What one router knows of replicas that they do not say themselves."""

    avoided: Avoided = field(default_factory=dict)
    sent: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    """Session -> the replica it was last claimed for, and until when the claim counts."""

    def suspects(self, now_s: float) -> frozenset[str]:
        """The replicas that failed somebody a moment ago."""
        return avoided_at(self.avoided, now_s)

    def pending(self, replicas: Sequence[ReplicaRecord], now_s: float) -> dict[str, int]:
        """Sessions sent to each replica that it does not count itself yet."""
        known = {r.id: r.sessions for r in replicas}
        counts: dict[str, int] = {}
        for session_id, (replica_id, until_s) in self.sent.items():
            if until_s > now_s and session_id not in known.get(replica_id, ()):
                counts[replica_id] = counts.get(replica_id, 0) + 1
        return counts


def failed(memory: Memory, replica_id: str, now_s: float) -> Memory:
    """A replica has failed somebody: it is the last choice for a few seconds."""
    return replace(memory, avoided=avoiding(memory.avoided, replica_id, now_s))


def claimed(memory: Memory, session_id: str, replica_id: str, now_s: float) -> Memory:
    """A session was claimed for a replica; earlier claims of it have been taken back by this."""
    sent = {sid: claim for sid, claim in memory.sent.items() if claim[1] > now_s}
    return replace(memory, sent=sent | {session_id: (replica_id, now_s + PENDING_S)})


# The decision


@dataclass(frozen=True, slots=True)
class Standing:
    """The session is generated there."""

    owner: Owner


@dataclass(frozen=True, slots=True)
class Wait:
    """Look again after a random time of at most `at_most_s`."""

    at_most_s: float


@dataclass(frozen=True, slots=True)
class Claim:
    """Nobody generates the session; claim it for this replica."""

    replica: ReplicaRecord


def decide(
    record: SessionRecord,
    replicas: Sequence[ReplicaRecord],
    ask: Ask,
    *,
    first: bool,
    cap: int,
    policy: ResumePolicy = ResumePolicy.EXACT,
    suspects: Collection[str] = (),
    pending: Mapping[str, int] | None = None,
) -> Standing | Wait | Claim:
    """What follows from one look at the directory; `first`: the first one of this search.

    `replicas` may be a sample in which the record's owner is, if it lives; see `holds_for_all`.
    Equal replicas are preferred in an order of the session's own, lest all sessions go to the same.
    Nothing here depends on the router's clock, which may be seconds off.
    Raises `SessionClosed`, `SessionPaused`, `NoReplica`, `CapacityError`.
    """
    if record.state is SessionState.CLOSED:
        raise SessionClosed(f"session {record.id} is closed; create another one")
    if record.state is SessionState.PAUSED and not ask.wake and record.epoch != ask.last_epoch:
        raise SessionPaused(f"session {record.id} is paused; resume it")
    owner = _standing(record, replicas, ask.failed)
    if owner is not None:
        return Standing(owner)
    if first and record.epoch > 0:
        # Other routers have just seen the same loss: let one of them be first.
        return Wait(JITTER_S)
    return Claim(
        best_replica(
            sorted(replicas, key=lambda r: zlib.crc32(f"{record.id} {r.id}".encode())),
            model=record.model,
            cap=cap,
            made_by=record.fingerprint,
            policy=policy,
            avoid=ask.avoid,
            suspects=suspects,
            pending=pending,
        )
    )


def holds_for_all(
    decision: Standing | Wait | Claim, record: SessionRecord, suspects: Collection[str]
) -> bool:
    """Whether what was decided on a sample of the replicas is good enough to act on.

    It is not where the choice is one that any other replica might be better than: a suspect, or an
    engine that makes other bits than the session has.
    """
    if not isinstance(decision, Claim):
        return True
    chosen = decision.replica
    return chosen.id not in suspects and fit(record.fingerprint, chosen.fingerprint) is Fit.SAME


def is_owned(record: SessionRecord, wall_s: float) -> bool:
    """Whether somebody holds a lease on the session that has not run out."""
    return record.owner is not None and record.lease_until > wall_s


def unsettled(session_id: str) -> NoReplica:
    """The refusal after `LOOKS` looks that led to no owner."""
    return NoReplica(
        f"session {session_id} changed hands {LOOKS} times in a row; retry", retry_after_s=1.0
    )


def _standing(
    record: SessionRecord, replicas: Sequence[ReplicaRecord], failed: Owner | None
) -> Owner | None:
    # A live replica is asked even if its lease looks over from here: the router's clock may be
    # ahead of the store's, and two such routers would take the session from each other for ever.
    # A lease that did run out is extended by the asking, or the replica refuses.
    if record.state is not SessionState.LIVE:
        return None
    if failed is not None and record.epoch <= failed.epoch:
        return None
    replica = next((r for r in replicas if r.id == record.owner), None)
    if replica is None:
        return None
    return Owner(record.id, replica.id, replica.address, record.epoch, record.next_index)
