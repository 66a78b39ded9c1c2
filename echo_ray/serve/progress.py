"""One session on the engine thread: load, replay, generate, commit, publish.

    fetch (other thread) -> load -> replay up to next_index -> seal, step, commit, publish, ...

Everything here runs on the one engine thread and does one piece of work per call, so sessions take
turns at chunk boundaries. Before each write the lease is checked by the own clock, and the store
refuses a stale one anyway. Nothing is published that is not committed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from concurrent.futures import Future

from echo_ray.errors import (
    ClipLost,
    ConflictError,
    EchoError,
    EngineError,
    Fenced,
    InvalidRequestError,
    NotFoundError,
    SessionClosed,
    SnapshotError,
    StoreUnavailable,
)
from echo_ray.serve.bench import FAILURES_IN_A_ROW, RETRY_AFTER_S, Bench
from echo_ray.serve.fetch import Fetched
from echo_ray.serve.runner import LeaseOver, SessionRunner
from echo_ray.serve.segments import Segment
from echo_ray.serve.telemetry import log
from echo_ray.session.engine_port import State
from echo_ray.session.pacing import Demand, Playout, Turn, next_chunk
from echo_ray.session.records import SessionState
from echo_ray.session.replay import ControlLog, Verdict, compare

FOLLOW_EVERY_S = 0.05
"""A shadow looks for new commits this often."""


class Progress:
    """The engine thread's side of one session."""

    def __init__(self, runner: SessionRunner, bench: Bench) -> None:
        self.runner = runner
        self._bench = bench
        self._state: State | None = None
        self._fetching: Future[Fetched] | None = None
        self._refused: frozenset[str] = frozenset()
        self._log = ControlLog()
        self._digests: Mapping[int, str] = {}
        self._saved: set[int] = set()
        self._unconfirmed: Segment | None = None
        self._diverged = False
        self._playout: Playout | None = None
        self._failures = 0
        self._replayed = 0
        self._retry_at_s = -math.inf
        self._served_s = -math.inf
        self._resumed = False
        self._held_back = False
        """Nobody wanted the next chunk for a while, so its being late is no stall."""

    # Turns

    def turn(self) -> Turn | None:
        """When this session needs the engine thread next; None until something changes."""
        runner = self.runner
        if runner.ended is not None or runner.releasing:
            return None
        if runner.release_as is not None:
            return self._turn(-math.inf, -math.inf)
        if self._state is None:
            if self._fetching is not None and not self._fetching.done():
                return None
            return self._turn(-math.inf, runner.arrived_s)
        return self._turn_with_state(self._state)

    def _turn_with_state(self, state: State) -> Turn | None:
        runner, shape = self.runner, self._bench.engine.shape
        if runner.refresh or self._unconfirmed is not None:
            return self._turn(-math.inf, runner.arrived_s)
        if state.next_index < runner.committed:
            # A replay counts as a stream that began to play when the session arrived: it uses
            # what others leave, and does not make them stall for its sake.
            due_s = runner.arrived_s + self._replayed * shape.chunk_s
            return self._turn(-math.inf, math.inf if runner.shadow else due_s)
        if runner.shadow:
            return self._turn(self._served_s + FOLLOW_EVERY_S, math.inf)
        demand = Demand(
            pace=runner.record.pace,
            index=runner.committed,
            start_s=shape.start_s(runner.committed),
            want=runner.wanted(),
            waiting_since_s=runner.arrived_s,
        )
        lead_s = runner.config.lead_chunks * shape.chunk_s
        times = next_chunk(demand, self._playout, lead_s=lead_s)
        if times is None:
            self._held_back = True
            return None
        return self._turn(*times)

    def _turn(self, ready_s: float, due_s: float) -> Turn:
        ready_s = max(ready_s, self._retry_at_s)
        return Turn(self.runner.session_id, ready_s, due_s, self._served_s)

    # Work

    def work(self) -> None:
        """Do the next piece of work; whatever fails ends here."""
        runner, accounts = self.runner, self._bench.accounts
        used = runner.lease
        self._served_s = self._bench.clock.monotonic()
        try:
            self._work()
        except LeaseOver as error:
            if used is not None and runner.lost(used.lease, error):
                accounts.lease_lost(runner.session_id, "expired", error)
        except Fenced as error:
            accounts.fenced(runner.session_id, error)
            if used is not None:
                runner.lost(used.lease, error)
        except (NotFoundError, SessionClosed) as error:
            runner.end(error)
        except StoreUnavailable as error:
            accounts.store_failed(runner.session_id, "progress", error)
            self._retry_at_s = self._served_s + RETRY_AFTER_S
        except ConflictError as error:
            log(logging.WARNING, "reconcile", session=runner.session_id, error=error.message)
            self._retry_at_s = self._served_s + RETRY_AFTER_S
            runner.refresh = True
        except Exception as error:
            self._failed(error)
        if runner.ended is not None:
            self._state = self._unconfirmed = None

    def _work(self) -> None:
        runner = self.runner
        release_as = runner.begin_release()
        if release_as is not None:
            self._bench.writer.release(runner, release_as)
        elif self._state is None:
            self._load()
        elif runner.refresh:
            self._refresh(self._state)
        elif self._unconfirmed is not None:
            self._commit(self._state, self._unconfirmed)
        elif self._state.next_index < runner.committed:
            self._replay(self._state)
        elif runner.shadow:
            self._refresh(self._state)
        else:
            self._produce(self._state)

    def _drop_state(self) -> None:
        self._state = self._unconfirmed = self._fetching = None

    # Coming back

    def _load(self) -> None:
        runner, bench = self.runner, self._bench
        if self._fetching is None:
            self._fetching = bench.fetchers.submit(
                bench.fetch, runner.session_id, None, self._refused
            )
            self._fetching.add_done_callback(lambda _: runner.tell())
            return
        fetching, self._fetching = self._fetching, None
        fetched = fetching.result()
        self._refused = fetched.refused
        try:
            state = bench.state_of(fetched)
        except SnapshotError as error:
            if fetched.point is None:
                raise
            self._refused |= {fetched.point.id}
            bench.accounts.snapshot_refused(runner.session_id, fetched.point.id, error)
            return
        self._take(fetched, state)

    def _take(self, fetched: Fetched, state: State) -> None:
        runner, record = self.runner, fetched.record
        self._state = state
        self._log = ControlLog(fetched.entries)
        self._digests = fetched.digests
        self._saved = {ref.chunk_index for ref in fetched.refs}
        self._resumed = record.next_index > 0
        other = record.fingerprint not in (None, self._bench.engine.fingerprint)
        self._diverged = other and record.next_index > 0
        runner.newest_snapshot_at = max((r.created_at for r in fetched.refs), default=None)
        runner.restart(state.next_index, record.next_index)
        self._look_round(state)

    def _refresh(self, state: State) -> None:
        """Learn what was committed since; as a shadow, or after a change of the lease."""
        runner, directory = self.runner, self._bench.directory
        record = directory.get(runner.session_id)
        if runner.shadow and not runner.refresh and record.next_index == runner.committed:
            return
        if runner.refresh:
            self._replayed = 0
        known = min(runner.committed, record.next_index)
        start = min(state.next_index, known)
        self._log.fix(start, directory.controls(runner.session_id, start))
        found = directory.digests(runner.session_id, start, record.next_index)
        self._digests = {**self._digests, **found}
        unconfirmed, self._unconfirmed = self._unconfirmed, None
        if unconfirmed is not None:
            index = unconfirmed.chunk.index
            if found.get(index) == unconfirmed.chunk.digest:
                runner.publish(unconfirmed, index + 1)
            elif record.next_index == index < record.sealed:
                self._unconfirmed = unconfirmed
            else:
                self._drop_state()
        elif state.next_index > record.next_index:
            self._drop_state()
        runner.refreshed(record.next_index)
        if self._state is not None:
            self._look_round(state)

    def _replay(self, state: State) -> None:
        runner, index = self.runner, state.next_index
        segment = self._bench.step(state, self._log)
        self._replayed += 1
        verdict = compare(self._digests, index, segment.chunk.digest)
        self._diverged = verdict is Verdict.DIFFERENT
        if self._diverged:
            segment.discontinuity = True
            self._bench.accounts.mismatch(
                runner.session_id, index, self._digests[index], segment.chunk.digest
            )
        self._bench.accounts.replayed()
        runner.publish(segment, index + 1)
        self._save(state)
        self._look_round(state)

    def _look_round(self, state: State) -> None:
        runner = self.runner
        if state.next_index >= runner.committed and not runner.caught_up and not runner.refresh:
            runner.caught_up = True
            if self._resumed and not runner.shadow:
                took_s = self._bench.clock.monotonic() - runner.arrived_s
                self._bench.accounts.resumed(runner.session_id, took_s, self._replayed)
        runner.tell()

    # Going on

    def _produce(self, state: State) -> None:
        runner, index = self.runner, state.next_index
        entries = self._bench.directory.seal(runner.held(), index)
        self._log.fix(index, entries)
        segment = self._bench.step(state, self._log)
        segment.discontinuity = self._diverged
        self._unconfirmed = segment
        self._commit(state, segment)

    def _commit(self, state: State, segment: Segment) -> None:
        runner, chunk, bench = self.runner, segment.chunk, self._bench
        bench.directory.commit(runner.held(), chunk.index, chunk.digest, bench.engine.fingerprint)
        self._unconfirmed = None
        self._diverged = False
        self._failures = 0
        runner.publish(segment, chunk.index + 1)
        now_s = bench.clock.monotonic()
        first = self._playout is None
        late_s = 0.0
        if self._playout is None:
            self._playout = Playout.begins(now_s, segment.start_s)
        else:
            late_s = 0.0 if self._held_back else now_s - self._playout.due_s(segment.start_s)
            self._playout = self._playout.after_publishing(now_s, segment.start_s)
        self._held_back = False
        bench.accounts.produced(segment, bench.engine.shape, late_s=late_s)
        if first:
            bench.accounts.first_chunk(now_s - runner.arrived_s, resumed=self._resumed)
        self._save(state)

    def _save(self, state: State) -> None:
        index = state.next_index
        if self.runner.shadow or not state.at_point or index == 0 or index in self._saved:
            return
        self._saved.add(index)
        try:
            snapshot = self._bench.engine.save(state)
        except EngineError as error:
            self._bench.accounts.snapshot_failed(self.runner.session_id, index, error)
            return
        self._bench.writer.submit(self.runner, snapshot, index)

    # Failing

    def _failed(self, error: Exception) -> None:
        """The engine failed, and with it the state is lost: load and replay, or give up."""
        runner = self.runner
        self._failures += 1
        self._bench.accounts.engine_failed(runner.session_id, self._failures, error)
        self._drop_state()
        refused = isinstance(error, InvalidRequestError | ClipLost)
        if not refused and self._failures < FAILURES_IN_A_ROW:
            self._retry_at_s = self._served_s + RETRY_AFTER_S
            return
        told = error if isinstance(error, EchoError) else EngineError(f"engine failed: {error!r}")
        if runner.shadow:
            runner.end(told)
            return
        # What is refused or lost here is so everywhere; handing it round helps nobody.
        state = SessionState.PAUSED if refused else SessionState.LIVE
        runner.retire(state, failure=told)
