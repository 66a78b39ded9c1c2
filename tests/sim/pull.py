"""One pull of a viewer at its router: what `session/pulling.py` decides, over virtual links."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from sim.kernel import Bell, Process, Rung
from sim.network import Pipe
from sim.progress import LEAD
from sim.serving import BEAT_S, CLOSED, GOING_AWAY, Line, serve_pull
from sim.stream import Segment

from echo_ray.errors import EchoError, Fenced
from echo_ray.session import pull_events, pulling
from echo_ray.session.locating import Ask, Owner, SessionPaused
from echo_ray.session.pulling import Cause, End, Find, OwnerLost, Pulling, Read, Rest, Shun

if TYPE_CHECKING:
    from sim.router import Router

SILENCE_S = 1.2
PATIENCE_S = 30.0


class Pull:
    """Segments from whoever owns the session, in order, to one viewer."""

    def __init__(self, router: Router, session_id: str, start: int, out: Pipe, acks: Pipe) -> None:
        self.session_id = session_id
        self._router, self._host = router, router.host
        self._out, self._acks = out, acks
        self._position = start
        self._over = False
        self._wake = True
        self._poked = Bell(self._host.world)
        self._now = Pulling(
            next=start,
            told_s=self._host.monotonic(),
            beat_s=BEAT_S,
            silence_s=SILENCE_S,
            patience_s=PATIENCE_S,
        )

    def run(self) -> Process:
        """The pull's process: until the viewer goes or the session ends."""
        self._router.pulls[self] = None
        while not self._left():
            now_s = self._host.monotonic()
            match pulling.work(self._now, now_s, wake=self._wake):
                case Find(ask):
                    yield from self._find(ask)
                case Read(owner, start):
                    yield from self._read(owner, start)
                case Rest(until_s):
                    yield Rung(min(BEAT_S, until_s - now_s), self._poked, self._acks.bell)
                case End(error):
                    self._out.send(error)
                    break
        self._acks.close()
        self._router.pulls.pop(self, None)

    def poke(self) -> None:
        """The record has changed: look at it again at once."""
        self._apply(pull_events.poked)
        self._poked.ring()

    def _left(self) -> bool:
        while self._acks.items:
            position = self._acks.items.popleft()
            if position is None:
                self._over = True
            else:
                self._position = max(self._position, position)
        return self._over or self._out.gone

    def _apply(self, event: Callable[[Pulling], pull_events.Step]) -> None:
        self._now, effects = event(self._now)
        for effect in effects:
            if isinstance(effect, pull_events.Lost):
                self._router.ledger.counts["owners lost"] += 1
                self._host.world.note(
                    "{} lost {} of {}: {}",
                    self._host.name,
                    effect.owner.replica_id,
                    self.session_id,
                    effect.reason,
                )
                if effect.avoid:
                    self._router.avoid(effect.owner.replica_id)

    def _failed(self, event: Callable[..., pull_events.Step], **what: Any) -> None:
        jitter = self._host.world.rng.uniform(0.5, 1.0)
        self._apply(partial(event, now_s=self._host.monotonic(), jitter=jitter, **what))

    def _find(self, ask: Ask) -> Iterator[Any]:
        self._apply(pull_events.finding)
        try:
            owner = yield from self._router.find(self.session_id, ask)
        except (EchoError, SessionPaused) as error:
            self._failed(pull_events.not_found, error=error)
        else:
            self._apply(partial(pull_events.found, owner=owner))

    def _read(self, owner: Owner, start: int) -> Iterator[Any]:
        network, replica = self._router.network, self._router.replicas[owner.address]
        line = Line(
            Pipe(network, replica.host, self._host, CLOSED),
            Pipe(network, self._host, replica.host, None),
        )
        sent = self._position + LEAD
        opening = partial(serve_pull, replica, owner, start, sent, line)
        network.connect(
            self._host,
            replica.host,
            lambda: replica.host.run(opening()),
            lambda: line.inbox.send(CLOSED),
        )
        began_s = self._host.monotonic()
        try:
            while self._now.owner is owner and not self._left():
                if line.inbox.items:
                    self._apply(pull_events.heard)
                    self._message(line.inbox.items.popleft())
                    began_s = self._host.monotonic()
                elif self._host.monotonic() - began_s >= BEAT_S:
                    self._failed(pull_events.quiet)
                    began_s = self._host.monotonic()
                else:
                    wait_s = began_s + BEAT_S - self._host.monotonic()
                    yield Rung(wait_s, line.inbox.bell, self._acks.bell, self._poked)
                if (want := self._position + LEAD) != sent:
                    line.wants.send(want)
                    sent = want
        except OwnerLost as loss:
            self._failed(pull_events.lost, loss=loss)
        line.inbox.close()
        line.wants.send(None)

    def _message(self, item: Any) -> None:
        self._wake = False
        match item:
            case Segment(index):
                if pulling.takes(self._now, index):
                    self._out.send(item)
                    now_s = self._host.monotonic()
                    self._apply(partial(pull_events.delivered, index=index, now_s=now_s))
            case _ if item == GOING_AWAY:
                raise OwnerLost(GOING_AWAY, cause=Cause.DRAIN)
            case _ if item == CLOSED:
                raise OwnerLost("broke")
            case Fenced():
                raise OwnerLost("fenced", cause=Cause.FENCED, shun=Shun.NOBODY)
            case EchoError():
                self._failed(pull_events.refused, error=item)
