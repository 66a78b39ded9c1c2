"""Routers and viewers of the simulation: execute pulls across owners, and watch what comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sim.kernel import Bell, Host, Network, Pipe, Process, Rung, Sleep
from sim.replica import LEAD, LEASE_TTL_S, SLOTS, Reader, Replica, Seat, Segment
from sim.store import Store

from echo_ray.errors import EchoError, Fenced
from echo_ray.session import locating, pull_events, pulling
from echo_ray.session.locating import (
    LOOKS,
    Ask,
    Claim,
    Memory,
    Owner,
    SessionPaused,
    Standing,
    Wait,
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
)

BEAT_S = 0.2
SILENCE_S = 1.2
PATIENCE_S = 30.0


@dataclass(slots=True, eq=False)
class Viewer:
    """Somebody who watches one session: what came, and how late."""

    name: str
    session_id: str
    next: int = 0
    playing_s: float | None = None
    """When chunk 0 began to play, moved by every stall."""
    stalled_s: float = 0.0
    gone: bool = False
    ended: EchoError | None = None


class Router:
    """One router process."""

    def __init__(
        self, host: Host, network: Network, store: Store, replicas: Mapping[str, Replica]
    ) -> None:
        self.host = host
        self._network = network
        self._store = store
        self._replicas = replicas
        self._memory = Memory()

    def start(self) -> None:
        """Begin as an empty process."""
        self._memory = Memory()

    def watch(self, viewer: Viewer, take: Callable[[Segment], None]) -> None:
        """Pull for a viewer from its next index on, as long as both live."""
        self.host.run(self._pull(viewer, take))

    # Owners

    def find(self, session_id: str, ask: Ask) -> Iterator[Any]:
        """The session's owner, claimed if it has none."""
        for look in range(LOOKS):
            record = yield from self._store.get(self.host, session_id)
            replicas = yield from self._store.replicas(self.host)
            now_s = self.host.monotonic()
            decision = locating.decide(
                record,
                replicas,
                ask,
                first=look == 0,
                cap=SLOTS,
                suspects=self._memory.suspects(now_s),
                pending=self._memory.pending(replicas, now_s),
                wall_s=self.host.wall(),
            )
            match decision:
                case Standing(owner):
                    return owner
                case Wait(at_most_s):
                    yield Sleep(self.host.world.rng.uniform(0, at_most_s))
                case Claim(replica):
                    try:
                        lease = yield from self._store.claim(
                            self.host, session_id, replica.id, record.epoch, LEASE_TTL_S
                        )
                    except Fenced:
                        continue
                    now_s = self.host.monotonic()
                    self._memory = locating.claimed(self._memory, session_id, replica.id, now_s)
                    return Owner(session_id, replica.id, replica.address, lease.epoch)
        raise locating.unsettled(session_id)

    # Pulls

    def _pull(self, viewer: Viewer, take: Callable[[Segment], None]) -> Process:
        pull = _Pull(self, viewer, take)
        while not viewer.gone:
            now_s = self.host.monotonic()
            match pulling.work(pull.now, now_s, wake=True):
                case Find(ask):
                    yield from pull.find(ask)
                case Read(owner, start):
                    yield from pull.read(owner, start)
                case Rest(until_s):
                    yield Rung(pull.poked, until_s - now_s)
                case End(error):
                    viewer.ended = error
                    return

    def avoid(self, replica_id: str) -> None:
        self._memory = locating.failed(self._memory, replica_id, self.host.monotonic())


class _Pull:
    """One pull and its effects."""

    def __init__(self, router: Router, viewer: Viewer, take: Callable[[Segment], None]) -> None:
        self.router, self.host, self.viewer, self._take = router, router.host, viewer, take
        self.poked = Bell()
        self.now = Pulling(
            next=viewer.next,
            told_s=self.host.monotonic(),
            beat_s=BEAT_S,
            silence_s=SILENCE_S,
            patience_s=PATIENCE_S,
        )

    def apply(self, event: Callable[[Pulling], pull_events.Step]) -> None:
        self.now, effects = event(self.now)
        for effect in effects:
            if isinstance(effect, pull_events.Lost):
                where = f"{self.viewer.name} at {self.host.name}"
                self.host.world.note(f"{where} lost {effect.owner.replica_id}: {effect.reason}")
                if effect.avoid:
                    self.router.avoid(effect.owner.replica_id)

    def failed(self, event: Callable[..., pull_events.Step], **what: Any) -> None:
        jitter = self.host.world.rng.uniform(0.5, 1.0)
        self.apply(partial(event, now_s=self.host.monotonic(), jitter=jitter, **what))

    def find(self, ask: Ask) -> Iterator[Any]:
        self.apply(pull_events.finding)
        try:
            owner = yield from self.router.find(self.viewer.session_id, ask)
        except (EchoError, SessionPaused) as error:
            self.failed(pull_events.not_found, error=error)
        else:
            self.apply(partial(pull_events.found, owner=owner))

    def read(self, owner: Owner, start: int) -> Iterator[Any]:
        router, viewer = self.router, self.viewer
        replica = router._replicas[owner.address]
        inbox = Pipe(router._network, replica.host, self.host, "closed")
        wants = Pipe(router._network, self.host, replica.host, None)
        wants.send(viewer.next + LEAD)
        opening = partial(serve_pull, replica, owner, start, inbox, wants)
        router._network.send(self.host, replica.host, lambda: replica.host.run(opening()))
        sent = -1
        try:
            while self.now.owner is owner and not viewer.gone:
                if not inbox.items:
                    before = self.host.monotonic()
                    yield Rung(inbox.bell, BEAT_S)
                    if not inbox.items and self.host.monotonic() - before >= BEAT_S:
                        self.failed(pull_events.quiet)
                    continue
                self.apply(pull_events.heard)
                self._message(inbox.items.pop(0))
                if (want := viewer.next + LEAD) != sent:
                    wants.send(want)
                    sent = want
        except OwnerLost as loss:
            self.failed(pull_events.lost, loss=loss)
        wants.send(None)

    def _message(self, item: Any) -> None:
        match item:
            case Segment(index):
                if pulling.takes(self.now, index):
                    self._take(item)
                    now_s = self.host.monotonic()
                    self.apply(partial(pull_events.delivered, index=index, now_s=now_s))
            case "going away":
                raise OwnerLost("going away", cause=Cause.DRAIN)
            case "closed":
                raise OwnerLost("broke")
            case Fenced():
                raise OwnerLost("fenced", cause=Cause.FENCED, shun=Shun.NOBODY)
            case EchoError():
                self.failed(pull_events.refused, error=item)


def serve_pull(replica: Replica, owner: Owner, start: int, inbox: Pipe, wants: Pipe) -> Process:
    """The replica's end of a pull."""
    yield from _serve(replica, owner, start, inbox, wants)


def _serve(replica: Replica, owner: Owner, start: int, inbox: Pipe, wants: Pipe) -> Process:
    """The replica's end of a pull; a process that dies leaves nothing to tidy up."""
    if replica.id != owner.replica_id:
        inbox.send("closed")
        return
    reader = Reader(owner.epoch, start, 0)
    try:
        seat = yield from replica.own(owner.session_id, owner.epoch)
    except EchoError as error:
        inbox.send(error)
        return
    replica.attach(seat, reader)
    try:
        yield from _feed(replica, seat, reader, inbox, wants)
    except EchoError as error:
        inbox.send(error)
    replica.detach(seat, reader)


def _feed(replica: Replica, seat: Seat, reader: Reader, inbox: Pipe, wants: Pipe) -> Iterator[Any]:
    """Segments as they are published, and beats, until the reader goes or the session does."""
    host, index = replica.host, reader.cursor
    beat_s = host.monotonic()
    while True:
        while wants.items:
            want = wants.items.pop(0)
            if want is None:
                return
            reader.want = max(reader.want, want)
            replica.wake()
        segment = replica.segment(seat, reader, index)
        if segment is not None:
            inbox.send(segment)
            index += 1
            continue
        if seat.now.going_away and seat.now.releasing:
            inbox.send("going away")
            return
        if host.monotonic() - beat_s >= BEAT_S:
            inbox.send("beat")
            beat_s = host.monotonic()
        yield Rung(_either(reader.bell, wants.bell), BEAT_S)


def _either(one: Bell, other: Bell) -> Bell:
    both = Bell()
    one.add(both.ring)
    other.add(both.ring)
    return both
