"""Bugs to plant, one function each, by what the code would do wrong: they show what is found.

`plant(object, name, replacement)` is pytest's `monkeypatch.setattr`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sim import pull, serving
from sim.kernel import Host, Process, Sleep
from sim.progress import Progress
from sim.router import Router
from sim.seat import RETENTION, Seat
from sim.serving import Line
from sim.store import Store
from sim.stream import StreamState

from echo_ray.errors import SegmentExpired
from echo_ray.session import control_log, locating, moving, owner_events, owning, pulling
from echo_ray.session.lease import LeaseView
from echo_ray.session.records import SessionState
from echo_ray.session.replay import ControlLog
from echo_ray.storage.memory import MemoryDirectory

Plant = Callable[[Any, str, Any], None]
Planting = Callable[[Plant], None]


# Owners and epochs


def no_fence(plant: Plant) -> None:
    """The store takes an owner's writes whoever owns the session by now."""
    plant(control_log, "check_fence", lambda record, lease: None)


def no_fence_on_snapshots(plant: Plant) -> None:
    """The store records a snapshot of an owner that was replaced."""
    plant(control_log, "recorded_snapshot", lambda record, lease, ref, earlier: ref)


def no_lease_check(plant: Plant) -> None:
    """Owners believe in their leases for ever."""
    plant(LeaseView, "valid", lambda self, now_s: True)


def lease_renewed_after_its_loss(plant: Plant) -> None:
    """The store renews the lease of an owner that was replaced."""
    plant(MemoryDirectory, "renew", lambda self, leases, *, ttl_s: [])


def epoch_not_raised_by_claims(plant: Plant) -> None:
    """The second owner has the epoch of the first."""
    right = control_log.claimed

    def claimed(record: Any, owner: str, **how: Any) -> Any:
        now = right(record, owner, **how)
        return now if record.epoch == 0 else replace(now, epoch=record.epoch)

    plant(control_log, "claimed", claimed)


def pause_without_fence(plant: Plant) -> None:
    """Pausing and closing leave the owner its session."""
    right = control_log.with_state

    def with_state(record: Any, state: str) -> Any:
        now = right(record, state)
        return replace(now, owner=record.owner, epoch=record.epoch)

    plant(control_log, "with_state", with_state)


def clocks_believed(plant: Plant) -> None:
    """A router takes a session from its owner when its own clock says that the lease is over."""
    right = Store.get

    def get(self: Store, caller: Host, session_id: str) -> Process:
        record = yield from right(self, caller, session_id)
        if caller.name.startswith("t") and not locating.is_owned(record, caller.wall()):
            record = replace(record, owner=None)
        return record

    plant(Store, "get", get)


def callers_deadlines(plant: Plant) -> None:
    """Deadlines are by the callers' clocks, which are seconds off, and not by the store's."""
    right = Store._ask

    def ask(self: Store, caller: Host, work: Callable[[], Any]) -> Process:
        def served() -> Any:
            self.directory._clock = caller
            return work()

        return right(self, caller, served)

    plant(Store, "_ask", ask)


# Chunks


def publish_before_commit(plant: Plant) -> None:
    """Readers have a chunk before the store has it."""
    right = Progress._commit

    def commit(self: Progress, segment: Any) -> Process:
        seat = self.seat
        seat.segments[segment.index] = segment
        seat.now = replace(seat.now, committed=segment.index + 1)
        seat.bell.ring()
        yield from right(self, segment)

    plant(Progress, "_commit", commit)


def no_index_check(plant: Plant) -> None:
    """The store takes any index, also one that it has."""
    plant(control_log, "_check_next", lambda record, index, verb: None)


def no_replay_log(plant: Plant) -> None:
    """A session comes back from a point without the switches since."""
    right = Progress._take

    def take(self: Progress, fetched: Any) -> None:
        right(self, replace(fetched, log=ControlLog()))

    plant(Progress, "_take", take)


def move_skips(plant: Plant) -> None:
    """A move claims at once, and the new owner goes on from wherever its shadow is."""
    right_step, right_refresh = Router._step, Progress._refresh

    def step(self: Router, move: Any) -> Process:
        if move.work is moving.Work.PREPARE:
            self.replicas[move.target.address].host.run(_follow(self, move))
            yield Sleep(0.01)
            return moving.prepared(move)
        return (yield from right_step(self, move))

    def refresh(self: Progress, state: StreamState, used: Any) -> Process:
        record = yield from self._store.get(self._host, self.seat.record.id)
        seat = self.seat
        if seat.now.refresh and state.next_index < record.next_index:
            skipped = StreamState(record.next_index, state.hidden)
            seat.state, seat.now = skipped, replace(seat.now, at=record.next_index)
            state = skipped
        yield from right_refresh(self, state, used)

    plant(Router, "_step", step)
    plant(Progress, "_refresh", refresh)


def move_stops_the_owner(plant: Plant) -> None:
    """A move takes the session from its owner before the target begins to catch up."""
    right = Router._step

    def step(self: Router, move: Any) -> Process:
        if move.work is moving.Work.PREPARE:
            yield from self._store.set_state(self.host, move.record.id, SessionState.PAUSED)
            yield Sleep(8)
            yield from self._store.set_state(self.host, move.record.id, SessionState.LIVE)
        return (yield from right(self, move))

    plant(Router, "_step", step)


def _follow(router: Router, move: Any) -> Process:
    yield from router.replicas[move.target.address].prepare(move.record.id)


# Controls


def seal_seals_nothing(plant: Plant) -> None:
    """Events are still pinned to a chunk that is being made."""
    right = control_log.placed

    def placed(record: Any, *rest: Any) -> Any:
        return right(replace(record, sealed=record.next_index), *rest)

    plant(control_log, "placed", placed)


def repetition_applied(plant: Plant) -> None:
    """An event whose answer was lost is appended once more when it is repeated."""
    right = control_log.placed

    def placed(record: Any, event_id: str, prompt: str, at: int | None, earlier: Any) -> Any:
        return right(record, event_id, prompt, at, None)

    plant(control_log, "placed", placed)


def acknowledged_before_durable(plant: Plant) -> None:
    """The answer to an event goes out before the log has it."""
    right = Store.append

    def append(self: Store, session_id: str, event_id: str, prompt: str, at: int | None) -> Any:
        record, known = self.directory.get(session_id), self.directory._sessions[session_id].log
        logged = control_log.placed(record, event_id, prompt, at, known.get(event_id))

        def write() -> None:
            if not self.host.stopped and not self.refusing:
                right(self, session_id, event_id, prompt, logged.entry.chunk)

        self.host.world.after(0.05, write)
        return logged.entry

    plant(Store, "append", append)


# Readers


def any_index_taken(plant: Plant) -> None:
    """A pull takes whatever comes, and replicas begin one chunk too early."""
    right = serving.serve_pull

    def serve_pull(replica: Any, owner: Any, start: int, until: int, line: Line) -> Process:
        yield from right(replica, owner, max(0, start - 1), until, line)

    plant(pulling, "takes", lambda p, index: True)
    plant(pull, "serve_pull", serve_pull)


def retention_not_honoured(plant: Plant) -> None:
    """Chunks are refused that are still within the retention."""
    right = Seat.segment

    def segment(self: Seat, reader: Any, index: int) -> Any:
        if self.now.planned and index < self.now.committed - RETENTION // 2:
            raise SegmentExpired(f"{index} is gone")
        return right(self, reader, index)

    plant(Seat, "segment", segment)


def readers_left_behind(plant: Plant) -> None:
    """A reader that leaves is still counted, and wants what it wanted."""
    plant(Seat, "detach", lambda self, reader: None)


def ring_without_end(plant: Plant) -> None:
    """A session keeps every segment that it ever made."""
    right = Seat.publish

    def publish(self: Seat, segment: Any, event: Any) -> None:
        kept = dict(self.segments)
        right(self, segment, event)
        self.segments = kept | self.segments

    plant(Seat, "publish", publish)


def nobody_asked(plant: Plant) -> None:
    """Chunks are made as time goes, whether anybody wants them or not."""
    plant(Seat, "wanted", lambda self: None)


def loss_ignored(plant: Plant) -> None:
    """A session whose lease ran out stays where it is, silent."""
    plant(owner_events, "lost", lambda o, lease, error: (replace(o, retry_at_s=1e9), ()))
    plant(owning, "check_reader", lambda o, epoch, now_s: None)
