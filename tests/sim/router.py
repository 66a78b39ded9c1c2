"""Routers of the simulation: find and claim owners, pull across them, move and sweep sessions."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sim.kernel import Host, Process, Sleep
from sim.ledger import Ledger
from sim.network import Ask as Asked
from sim.network import Network, Pipe
from sim.pull import Pull
from sim.replica import LEASE_TTL_S, SLOTS, Replica
from sim.store import Store

from echo_ray.errors import CapacityError, EchoError, Fenced, NoReplica, UnavailableError
from echo_ray.session import locating, moving
from echo_ray.session.locating import LOOKS, SAMPLE, Ask, Claim, Memory, Owner, Standing, Wait
from echo_ray.session.records import OnIdle, ReplicaRecord, SessionRecord, SessionState

SWEEP_S = 2.0
PREPARE_TIMEOUT_S = 10.0
OWN_TIMEOUT_S = 2.0


class Router:
    """One router process."""

    def __init__(
        self,
        host: Host,
        network: Network,
        store: Store,
        ledger: Ledger,
        replicas: Mapping[str, Replica],
    ) -> None:
        self.host = host
        self.network = network
        self.ledger = ledger
        self.replicas = replicas
        self._store = store
        self._begin()

    def _begin(self) -> None:
        self._memory = Memory()
        self.pulls: dict[Pull, None] = {}
        """In the order in which they began."""

    def start(self) -> None:
        """Begin as an empty process."""
        self._begin()
        self.host.run(self._sweep())

    def watch(self, session_id: str, start: int, out: Pipe, acks: Pipe) -> None:
        """Pull for a viewer from `start` on, as long as both live."""
        self.host.run(Pull(self, session_id, start, out, acks).run())

    def watched(self) -> Counter[str]:
        """How many pulls of each session there are."""
        return Counter(pull.session_id for pull in self.pulls)

    def avoid(self, replica_id: str) -> None:
        self._memory = locating.failed(self._memory, replica_id, self.host.monotonic())

    # Owners

    def find(self, session_id: str, ask: Ask) -> Iterator[Any]:
        """The session's owner, claimed if it has none."""
        for look in range(LOOKS):
            record = yield from self._store.get(self.host, session_id)
            decision = yield from self._look(record, ask, first=look == 0)
            match decision:
                case Standing(owner):
                    return owner
                case Wait(at_most_s):
                    yield Sleep(self.host.world.rng.uniform(0, at_most_s))
                case Claim(replica):
                    try:
                        owner = yield from self.claim(record, replica)
                    except Fenced:
                        continue
                    return owner
        raise locating.unsettled(session_id)

    def _look(self, record: SessionRecord, ask: Ask, *, first: bool) -> Iterator[Any]:
        """What follows from a few replicas, or from all if that is not good enough."""
        owner = () if record.owner is None else (record.owner,)
        some = yield from self._store.replicas(self.host, among=SAMPLE, named=owner)
        with contextlib.suppress(NoReplica, CapacityError):
            decision = self._decide(record, some, ask, first)
            suspects = self._memory.suspects(self.host.monotonic())
            if locating.holds_for_all(decision, record, suspects):
                return decision
        everybody = yield from self._store.replicas(self.host)
        return self._decide(record, everybody, ask, first)

    def _decide(
        self, record: SessionRecord, replicas: Sequence[ReplicaRecord], ask: Ask, first: bool
    ) -> Standing | Wait | Claim:
        now_s = self.host.monotonic()
        return locating.decide(
            record,
            replicas,
            ask,
            first=first,
            cap=SLOTS,
            suspects=self._memory.suspects(now_s),
            pending=self._memory.pending(replicas, now_s),
        )

    def claim(self, record: SessionRecord, replica: ReplicaRecord) -> Iterator[Any]:
        """Make `replica` the owner if the record still stands. Raises `Fenced` if it does not."""
        lease = yield from self._store.claim(
            self.host, record.id, replica.id, record.epoch, LEASE_TTL_S
        )
        now_s = self.host.monotonic()
        self._memory = locating.claimed(self._memory, record.id, replica.id, now_s)
        return Owner(record.id, replica.id, replica.address, lease.epoch)

    def _ask(self, owner: Owner, work: Callable[[Replica], Process], timeout_s: float) -> Asked:
        replica = self.replicas[owner.address]
        life = int(owner.replica_id.rpartition(".")[2])

        def there() -> Process:
            if replica.host.life != life:
                raise UnavailableError(f"{owner.replica_id} is gone")
            outcome = yield from work(replica)
            return None if outcome is None else True

        def lost() -> UnavailableError:
            return UnavailableError(f"{owner.replica_id} does not answer")

        return Asked(self.network, replica.host, there, timeout_s=timeout_s, lost=lost)

    def own(self, owner: Owner) -> Iterator[Any]:
        """Tell a replica that it owns a session."""
        yield self._ask(owner, lambda r: r.own(owner.session_id, owner.epoch), OWN_TIMEOUT_S)

    def adopt(self, session_id: str) -> Iterator[Any]:
        """Make sure that somebody generates the session, with or without readers."""
        owner = yield from self.find(session_id, Ask())
        yield from self.own(owner)

    def _sweep(self) -> Process:
        """Sessions that go on without viewers find an owner, slowly."""
        while True:
            yield Sleep(SWEEP_S * self.host.world.rng.uniform(0.75, 1.25))
            try:
                records = yield from self._store.list(self.host)
            except EchoError:
                continue
            watched, now = self.watched(), self.host.wall()
            for record in records:
                orphan = (
                    record.state is SessionState.LIVE
                    and record.on_idle is OnIdle.CONTINUE
                    and record.epoch > 0
                    and record.lease_until <= now
                    and record.id not in watched
                )
                if orphan:
                    try:
                        yield from self.adopt(record.id)
                    except EchoError:
                        continue

    # Planned moves

    def migrate(self, session_id: str, to: str | None) -> Iterator[Any]:
        """Move a session to replica `to` or to the best other one, as `moving` says."""
        record = yield from self._store.get(self.host, session_id)
        replicas = yield from self._store.replicas(self.host)
        now_s = self.host.monotonic()
        move = moving.plan(
            record,
            replicas,
            to,
            cap=SLOTS,
            suspects=self._memory.suspects(now_s),
            pending=self._memory.pending(replicas, now_s),
        )
        if move is None:
            return
        while move.work is not moving.Work.DONE:
            try:
                move = yield from self._step(move)
            except EchoError as error:
                move = moving.failed(move, error)
        if move.failed is not None:
            self.ledger.counts["moves that failed"] += 1
            raise move.failed
        self.ledger.counts["moves"] += 1
        self.poke(session_id)

    def _step(self, move: moving.Move) -> Iterator[Any]:
        record, target = move.record, move.target
        if move.work is moving.Work.PREPARE:
            shadow = Owner(record.id, target.id, target.address, record.epoch)
            yield self._ask(shadow, lambda r: r.prepare(record.id), PREPARE_TIMEOUT_S)
            return moving.prepared(move)
        if move.owner is None:
            owner = yield from self.claim(record, target)
            return moving.claimed(move, owner)
        yield from self.own(move.owner)
        return moving.told(move)

    def poke(self, session_id: str) -> None:
        """The session's record has changed; follow it at once."""
        for pull in list(self.pulls):
            if pull.session_id == session_id:
                pull.poke()

    def change(self, session_id: str, state: SessionState) -> Iterator[Any]:
        """Pause, resume or close a session, for a client."""
        yield from self._store.set_state(self.host, session_id, state)
        self.poke(session_id)

    def switch(self, session_id: str, event_id: str, prompt: str, at: int | None) -> Iterator[Any]:
        """Append a prompt switch, for a client; answered when it is durable."""
        return self._store.append_control(self.host, session_id, event_id, prompt, at)

    def request(self, client: Host, work: Callable[[], Process]) -> Asked:
        """A client's request to this router, whose answer may get lost."""

        def lost() -> UnavailableError:
            return UnavailableError(f"{self.host.name} does not answer")

        return Asked(self.network, self.host, work, timeout_s=OWN_TIMEOUT_S, lost=lost)
