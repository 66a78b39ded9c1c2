"""Past segments of a running session, made again beside it for readers who ask for them.

A replica that took a session over has only what came after the point it loaded. Older segments
within the retention are replayed here from an older point, with a state of their own, so that the
session itself never waits for them.
"""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import replace

from echo_ray.errors import ClipLost, SnapshotError, StoreUnavailable
from echo_ray.serve.bench import Bench, Making, Returning
from echo_ray.serve.fetch import Fetched
from echo_ray.serve.runner import SessionRunner
from echo_ray.session.engine_port import State
from echo_ray.session.owner_events import FAILURES_IN_A_ROW, RETRY_AFTER_S
from echo_ray.session.pacing import Turn, returning_due_s
from echo_ray.session.replay import ControlLog, Verdict, compare


class Backfill:
    """The engine thread's side of one session's past."""

    def __init__(self, runner: SessionRunner, bench: Bench) -> None:
        self._runner = runner
        self._bench = bench
        self._since_s = 0.0
        self._fetching: Future[Fetched] | None = None
        self._refused: frozenset[str] = frozenset()
        self._returning: Returning | None = None
        self._loading_s = 0.0
        self._fetched: Fetched | None = None
        self._controls = ControlLog()
        self._state: State | None = None
        self._making: Making | None = None
        self._made = 0
        self._failures = 0
        self._retry_at_s = -math.inf
        self._served_s = -math.inf

    def turn(self) -> Turn | None:
        """When the past needs the engine thread next; None while nobody asks for any."""
        wanted = self._runner.past_wanted()
        if wanted is None:
            self.forget()
            return None
        if self._fetching is not None and not self._fetching.done():
            return None
        if self._runner.past_next() is None:
            return None
        bench = self._bench
        if self._fetched is None and self._fetching is None and self._returning is None:
            self._since_s, self._made, self._loading_s = bench.clock.monotonic(), 0, 0.0
        # Like a stream that began to play when it was asked for.
        due_s = returning_due_s(
            self._since_s,
            loading_s=self._loading_s,
            made=self._made,
            chunk_seconds=bench.accounts.chunk_seconds,
            chunk_s=bench.engine.shape.chunk_s,
        )
        key = f"{self._runner.session_id}/past"
        return Turn(key, self._retry_at_s, due_s, self._served_s)

    def work(self) -> None:
        """Fetch, do a slice of loading, or one of a chunk that is made again."""
        self._served_s = self._bench.clock.monotonic()
        try:
            if self._state is None:
                self._load()
            else:
                self._replay(self._state)
        except StoreUnavailable as error:
            self._bench.accounts.store_failed(self._runner.session_id, "backfill", error)
            self._retry_at_s = self._served_s + RETRY_AFTER_S
        except Exception as error:
            self._failed(error)

    def forget(self) -> None:
        """Let go of the state, of what is in hand, and of what was fetched."""
        if self._state is not None:
            self._bench.engine.close(self._state)
        if self._returning is not None:
            self._returning.close()
        self._state = self._fetched = self._fetching = self._making = self._returning = None

    def _load(self) -> None:
        runner, bench, target = self._runner, self._bench, self._runner.past_next()
        if target is None:
            return
        if self._returning is not None:
            self._return(self._returning)
            return
        if self._fetching is None:
            self._fetching = bench.fetchers.submit(
                bench.fetch, runner.session_id, target, self._refused
            )
            self._fetching.add_done_callback(lambda _: runner.tell())
            return
        fetching, self._fetching = self._fetching, None
        fetched = fetching.result()
        self._refused = fetched.refused
        if fetched.index > target:
            runner.past_begins_at(fetched.index)
            return
        self._return(bench.returning(fetched))

    def _return(self, returning: Returning) -> None:
        runner, bench, fetched = self._runner, self._bench, returning.fetched
        self._returning = None
        try:
            self._state = returning.advance()
        except SnapshotError as error:
            if fetched.point is None:
                raise
            self._refused |= {fetched.point.id}
            bench.accounts.snapshot_refused(runner.session_id, fetched.point.id, error)
            return
        finally:
            self._loading_s += bench.clock.monotonic() - self._served_s
        if self._state is None:
            self._returning = returning
            return
        # The clip is in the state now, and may be large.
        self._fetched = replace(fetched, first_frames=b"")
        self._controls = ControlLog(fetched.entries)

    def _replay(self, state: State) -> None:
        runner, fetched, making = self._runner, self._fetched, self._making
        index, needed = making.index if making else state.next_index, runner.past_next()
        known = fetched is not None and index < fetched.record.next_index
        if fetched is None or not known or (needed is not None and index > needed):
            # The log that was fetched ends here, or somebody asks for what lies further back: a
            # chunk in hand is left where it is, and the state with it.
            self.forget()
            return
        if making is None:
            making = self._making = self._bench.begin(state, self._controls)
        segment = making.advance()
        if segment is None:
            return
        self._making = None
        self._made += 1
        self._failures = 0
        self._bench.accounts.replayed()
        if compare(fetched.digests, index, segment.chunk.digest) is Verdict.DIFFERENT:
            segment.discontinuity = True
            digests = fetched.digests[index], segment.chunk.digest
            engines = fetched.record.fingerprint, self._bench.engine.fingerprint
            self._bench.accounts.mismatch(runner.session_id, index, digests, engines)
        runner.publish_past(segment)

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._bench.accounts.engine_failed(self._runner.session_id, self._failures, error)
        self.forget()
        self._retry_at_s = self._served_s + RETRY_AFTER_S
        if self._failures >= FAILURES_IN_A_ROW or isinstance(error, ClipLost):
            self._runner.past_begins_at(None)
