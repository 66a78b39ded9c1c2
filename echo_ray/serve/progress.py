"""One session on the engine thread: carries out what `session/owning.py` says is to be done.

    fetch (other thread) -> load -> replay up to next_index -> seal, step, commit, publish, ...

Everything here runs on the one engine thread and does one piece of work per call. A load and a step
are a piece for each of their slices, so sessions take turns inside them. What happens to a session
in the middle of a load (another lease, a pause, a drain) takes effect at once, and a load that has
lost its purpose is left. To the session itself it is as if a step were one piece: all that takes
effect behind the chunk, and only the end of the session here leaves a step where it is: no turn
comes any more, nothing of the chunk was written but its seal, and the next owner makes it again.

Before each write the lease is checked by the own clock, and the store refuses a stale one anyway.
What an outcome means is decided in `session/owner_events.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial

from echo_ray.errors import (
    ConflictError,
    EngineError,
    Fenced,
    NotFoundError,
    SessionClosed,
    SnapshotError,
    StoreUnavailable,
)
from echo_ray.serve.bench import Bench, Making, Returning
from echo_ray.serve.fetch import Fetched
from echo_ray.serve.logs import about, log
from echo_ray.serve.runner import Event, SessionRunner
from echo_ray.serve.segments import Segment
from echo_ray.session import owner_events, owning
from echo_ray.session.engine_port import State
from echo_ray.session.fingerprint import NoFittingReplica
from echo_ray.session.lease import LeaseView
from echo_ray.session.owner_events import Effect
from echo_ray.session.owning import LeaseOver, Pacing, Work
from echo_ray.session.pacing import Turn
from echo_ray.session.replay import ControlLog, Verdict, compare
from echo_ray.session.restoring import seen_before


class Progress:
    """The engine thread's side of one session: its state, its log, and the chunk in hand."""

    def __init__(self, runner: SessionRunner, bench: Bench) -> None:
        self.runner = runner
        self._bench = bench
        self._state: State | None = None
        self._fetching: Future[Fetched] | None = None
        self._returning: Returning | None = None
        self._refused: frozenset[str] = frozenset()
        self._log = ControlLog()
        self._digests: Mapping[int, str] = {}
        self._made_by: str | None = None
        self._saved: set[int] = set()
        self._making: Making | None = None
        self._then: Callable[[State, Segment], None] = self._produced
        """What follows once the chunk in hand is there."""
        self._unconfirmed: Segment | None = None

    def turn(self) -> Turn | None:
        """When this session needs the engine thread next; None until something changes."""
        runner, shape, now = self.runner, self._bench.engine.shape, self.runner.now
        work = owning.work(now)
        if work is None or (work is Work.FETCH and self._fetching and not self._fetching.done()):
            return None
        pacing = Pacing(
            start_s=shape.start_s(now.committed),
            chunk_s=shape.chunk_s,
            lead_s=runner.config.lead_chunks * shape.chunk_s,
            want=runner.wanted() if work in (Work.PRODUCE, Work.ADVANCE) else None,
            chunk_seconds=self._bench.accounts.chunk_seconds,
        )
        times = owning.times(now, pacing)
        if times is None:
            self._apply(owner_events.held_back)
            return None
        return Turn(runner.session_id, *times, now.served_s)

    def work(self) -> None:
        """Do the next piece of work; whatever fails ends here."""
        runner, clock = self.runner, self._bench.clock
        used = runner.now.lease
        self._apply(partial(owner_events.begun, now_s=clock.monotonic()))
        epoch = None if used is None else used.lease.epoch
        index = self._making.index if self._making else runner.now.at
        with about(session=runner.session_id, epoch=epoch, chunk=index):
            try:
                self._work(used)
            except Exception as error:
                self._failed(error, used)
        if runner.ended is not None:
            self.forget()

    def _work(self, used: LeaseView | None) -> None:
        work, state, segment = owning.work(self.runner.now), self._state, self._unconfirmed
        if work is Work.RELEASE:
            self._release()
        elif work is Work.FETCH:
            self._load()
        elif state is None:
            return
        elif work is Work.REFRESH:
            self._refresh(state, used)
        elif work is Work.COMMIT and segment is not None:
            self._commit(state, segment)
        elif work is Work.ADVANCE and self._making is not None:
            self._advance(state, self._making)
        elif work is Work.REPLAY:
            self._begin(state, self._replayed)
        elif work is Work.PRODUCE:
            self._produce(state)

    def _apply(self, event: Event) -> None:
        self._carry_out(self.runner.apply(event))

    def _carry_out(self, effects: tuple[Effect, ...]) -> None:
        runner, accounts, clock = self.runner, self._bench.accounts, self._bench.clock
        if Effect.DROP_STATE in effects:
            self.forget()
        if Effect.RESUMED in effects:
            took_s = clock.monotonic() - runner.now.arrived_s
            accounts.resumed(runner.session_id, took_s, runner.now.replayed)

    def forget(self) -> None:
        """Let go of the state, and of all that belongs to it."""
        if self._state is not None:
            self._bench.engine.close(self._state)
        if self._returning is not None:
            self._returning.close()
        self._state = self._unconfirmed = self._fetching = self._making = self._returning = None
        self.runner.state_bytes = 0

    def _release(self) -> None:
        runner = self.runner
        self._apply(owner_events.releasing)
        state = runner.now.release_as
        if runner.now.releasing and state is not None:
            self._bench.writer.release(runner, state)

    # Coming back

    def _load(self) -> None:
        runner, bench = self.runner, self._bench
        if self._returning is not None:
            self._return(self._returning)
            return
        if self._fetching is None:
            self._fetching = bench.fetchers.submit(
                bench.fetch, runner.session_id, None, self._refused
            )
            self._fetching.add_done_callback(lambda _: runner.tell())
            return
        fetching, self._fetching = self._fetching, None
        fetched = fetching.result()
        self._refused = fetched.refused
        self._return(bench.returning(fetched))

    def _return(self, returning: Returning) -> None:
        """The next slice of loading."""
        runner, bench, fetched = self.runner, self._bench, returning.fetched
        self._returning = None
        try:
            state = returning.advance()
        except SnapshotError as error:
            if fetched.point is None:
                raise
            self._refused |= {fetched.point.id}
            bench.accounts.snapshot_refused(runner.session_id, fetched.point.id, error)
            return
        finally:
            self._apply(partial(owner_events.loading, now_s=bench.clock.monotonic()))
        if state is None:
            self._returning = returning
        else:
            self._take(fetched, state)

    def _take(self, fetched: Fetched, state: State) -> None:
        runner = self.runner
        self._state = state
        self._log = ControlLog(fetched.entries)
        self._digests = fetched.digests
        self._made_by = fetched.record.fingerprint
        self._saved = {ref.chunk_index for ref in fetched.refs}
        runner.newest_snapshot_at = max((r.created_at for r in fetched.refs), default=None)
        fingerprint = self._bench.engine.fingerprint
        loaded = partial(
            owner_events.loaded,
            at=state.next_index,
            record=fetched.record,
            fingerprint=fingerprint,
        )
        self._carry_out(runner.restart(state.next_index, loaded))

    def _refresh(self, state: State, used: LeaseView | None) -> None:
        """Learn what was committed since; as a shadow, or after a change of the lease."""
        runner, directory, now = self.runner, self._bench.directory, self.runner.now
        record = directory.get(runner.session_id)
        if now.shadow and not now.refresh and record.next_index == now.committed:
            return
        start = min(state.next_index, now.committed, record.next_index)
        self._log.fix(start, directory.controls(runner.session_id, start))
        found = directory.digests(runner.session_id, start, record.next_index)
        self._digests = {**self._digests, **found}
        pending = found.get(now.pending.index) if now.pending else None
        event = partial(owner_events.refreshed, record=record, found=pending, used=used)
        self._publish(event)

    def _publish(self, event: Event) -> None:
        """Let an event have happened that may confirm the chunk in hand."""
        segment = self._unconfirmed
        if segment is None:
            self._apply(event)
            return
        effects = self.runner.publish(segment, event)
        if self.runner.now.pending is None:
            self._unconfirmed = None
        self._carry_out(effects)

    def _begin(self, state: State, then: Callable[[State, Segment], None]) -> None:
        """The first slice of the state's next chunk; the others follow as turns come."""
        making = self._making = self._bench.begin(state, self._log)
        self._then = then
        self._apply(owner_events.stepping)
        self._advance(state, making)

    def _advance(self, state: State, making: Making) -> None:
        segment = making.advance()
        if segment is not None:
            self._making = None
            self._then(state, segment)

    def _replayed(self, state: State, segment: Segment) -> None:
        runner, accounts, index = self.runner, self._bench.accounts, segment.chunk.index
        verdict = compare(self._digests, index, segment.chunk.digest)
        if verdict is Verdict.DIFFERENT:
            segment.discontinuity = True
            digests = self._digests[index], segment.chunk.digest
            engines = self._made_by, self._bench.engine.fingerprint
            accounts.mismatch(runner.session_id, index, digests, engines)
        accounts.replayed()
        effects = runner.publish(
            segment, partial(owner_events.replayed, index=index, verdict=verdict)
        )
        self._save(state)
        self._carry_out(effects)

    # Going on

    def _produce(self, state: State) -> None:
        runner, index = self.runner, state.next_index
        entries = self._bench.directory.seal(runner.held(), index)
        self._log.fix(index, entries)
        self._begin(state, self._produced)

    def _produced(self, state: State, segment: Segment) -> None:
        index, segment.discontinuity = segment.chunk.index, self.runner.now.diverged
        self._unconfirmed = segment
        self._apply(partial(owner_events.made, index=index, digest=segment.chunk.digest))
        self._commit(state, segment)

    def _commit(self, state: State, segment: Segment) -> None:
        runner, chunk, bench = self.runner, segment.chunk, self._bench
        bench.directory.commit(runner.held(), chunk.index, chunk.digest, bench.engine.fingerprint)
        now_s = bench.clock.monotonic()
        want = runner.wanted()
        # A chunk that no viewer waits for is not late.
        late_s = 0.0
        if want is not None:
            late_s = owner_events.late_s(runner.now, segment.start_s, now_s)
        self._unconfirmed = None
        lease, lead = runner.now.lease, runner.config.lead_chunks
        epoch = 0 if lease is None else lease.lease.epoch
        event = partial(
            owner_events.committed,
            index=chunk.index,
            start_s=segment.start_s,
            now_s=now_s,
            seen=seen_before(chunk.index, epoch, want=want, lead_chunks=lead),
        )
        effects = runner.publish(segment, event)
        bench.accounts.produced(segment, bench.engine.shape, late_s=late_s)
        bench.accounts.traced(runner.session_id, epoch, segment, late_s)
        if Effect.FIRST_CHUNK in effects:
            now = runner.now
            bench.accounts.first_chunk(now_s - now.arrived_s, resumed=now.resumed)
        runner.state_bytes = bench.engine.state_bytes(state)
        bench.accounts.memory(bench.engine.memory())
        bench.accounts.kernels(bench.engine.fallbacks())
        self._save(state)

    def _save(self, state: State) -> None:
        index = state.next_index
        if self.runner.shadow or not state.at_point or index == 0 or index in self._saved:
            return
        self._saved.add(index)
        try:
            snapshot = self._bench.engine.saving(state)
        except EngineError as error:
            self._bench.accounts.snapshot_failed(self.runner.session_id, index, error)
            return
        self._bench.writer.submit(self.runner, snapshot, index)

    # Failing

    def _failed(self, error: Exception, used: LeaseView | None) -> None:
        runner, accounts = self.runner, self._bench.accounts
        event = partial(
            owner_events.failed, error=error, used=used, now_s=self._bench.clock.monotonic()
        )
        effects = runner.apply(event)
        if runner.record.next_index and not (runner.now.caught_up or runner.shadow):
            accounts.not_resumed(error)
        match error:
            case LeaseOver() if Effect.LOST in effects:
                accounts.lease_lost(runner.session_id, "expired", error)
            case LeaseOver():
                pass
            case Fenced():
                accounts.fenced(runner.session_id, error)
            case NotFoundError() | SessionClosed():
                pass
            case StoreUnavailable():
                accounts.store_failed(runner.session_id, "progress", error)
            case NoFittingReplica():
                accounts.unfit(runner.session_id, error)
            case ConflictError():
                log(logging.WARNING, "reconcile", session=runner.session_id, error=error.message)
            case _:
                accounts.engine_failed(runner.session_id, runner.now.failures, error)
        self._carry_out(effects)
