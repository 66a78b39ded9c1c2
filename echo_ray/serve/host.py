"""The sessions of one replica: lets them in under a valid epoch, runs them, gives them up.

Knows nothing of Ray and of sockets. Every public method may block on a store; call it from a
thread, never from an event loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from echo_ray.clock import Clock
from echo_ray.config import EchoConfig
from echo_ray.errors import (
    CapacityError,
    Draining,
    EchoError,
    Fenced,
    SegmentBeyondEnd,
    SessionClosed,
)
from echo_ray.serve.accounts import ProgressAccounts
from echo_ray.serve.backfill import Backfill
from echo_ray.serve.bench import Bench
from echo_ray.serve.fetch import Fetcher
from echo_ray.serve.lease_keeper import LeaseKeeper
from echo_ray.serve.progress import Progress
from echo_ray.serve.retention import make_newest_durable_soon
from echo_ray.serve.runner import SessionRunner
from echo_ray.serve.snapshot_writer import SnapshotWriter
from echo_ray.serve.stepper import Stepper, Work
from echo_ray.serve.telemetry import Telemetry
from echo_ray.serve.tier_accounts import TierAccounts
from echo_ray.serve.tracing import ChunkTracer
from echo_ray.session import draining, owner_events
from echo_ray.session.capacity import free_slots
from echo_ray.session.demand import Told
from echo_ray.session.draining import Drain, Reason, Verdict
from echo_ray.session.engine_port import Engine
from echo_ray.session.fingerprint import ResumePolicy
from echo_ray.session.lease import LeaseView
from echo_ray.session.records import Lease, ReplicaRecord, SessionRecord, SessionState
from echo_ray.storage.interface import Directory, SnapshotStore

ENGINE_STUCK_S = 30.0
"""An engine that is at one piece of work for this long is taken for hung."""
LOOK_S = 0.1
"""A replica that is being stopped looks this often whether others still take its sessions."""


class SessionHost:
    """Sessions, and the threads that work for them."""

    def __init__(
        self,
        *,
        replica_id: str,
        node_id: str,
        pid: int,
        build_engine: Callable[[], Engine],
        open_directory: Callable[[], Directory],
        store: SnapshotStore,
        config: EchoConfig,
        telemetry: Telemetry,
        clock: Clock,
        warm_up_chunks: int = 0,
        tracer: ChunkTracer | None = None,
    ) -> None:
        self.replica_id = replica_id
        self.config = config
        self.telemetry = telemetry
        self.clock = clock
        self.address = ""
        """Where the data socket listens; no heartbeat is sent before it is known."""
        self.told: Told = {}
        """What routers told this replica of what asks for room."""
        self._node_id, self._pid = node_id, pid
        self._store = store
        self._accounts = ProgressAccounts(telemetry, tracer)
        self._changed = threading.Condition(threading.RLock())
        self._sessions: dict[str, tuple[SessionRunner, tuple[Work, ...]]] = {}
        self._drain: Drain | None = None
        self._parked: list[str] = []
        self._drained = False
        # One for callers, snapshots and reading back, one for the engine thread, and one for the
        # leases alone, so that nothing slow is ever in front of a renewal.
        self._directories = [open_directory() for _ in range(3)]
        self._directory = self._directories[0]
        self._fetchers = ThreadPoolExecutor(2, thread_name_prefix="fetch")
        self._stepper = Stepper(
            build_engine, clock=clock, changed=self._changed, warm_up_chunks=warm_up_chunks
        )
        self.engine = self._stepper.start()
        if self._stepper.warm_up_seconds > 0:
            self._accounts.measured(self._stepper.warm_up_seconds)
        self._bench = self._make_bench()
        self._keeper = self._make_keeper()

    def _make_bench(self) -> Bench:
        session = self.config.session
        fetcher = Fetcher(
            directory=self._directory,
            store=self._store,
            telemetry=self.telemetry,
            clock=self.clock,
            shape=self.engine.shape,
            # A viewer at the end of the retention lags further while its past is made again.
            limit_chunks=2 * session.retention_chunks + self.engine.shape.point_every,
            limit_bytes=self.config.storage.snapshot_limit_bytes,
        )
        return Bench(
            engine=self.engine,
            directory=self._directories[1],
            fetch=fetcher.fetch,
            fetchers=self._fetchers,
            writer=SnapshotWriter(
                self._directory,
                self._store,
                self._accounts,
                self.clock,
                kept=session.snapshots_kept,
            ),
            accounts=self._accounts,
            clock=self.clock,
            policy=ResumePolicy(session.resume_policy),
        )

    def _make_keeper(self) -> LeaseKeeper:
        return LeaseKeeper(
            self._directories[2],
            runners=self.runners,
            drop=self._drop,
            record=self.record,
            drain_on=self._drain_on,
            may_renew=self.healthy,
            accounts=self._accounts,
            telemetry=self.telemetry,
            tiers=TierAccounts(self._store, self.telemetry),
            shape=self.engine.shape,
            clock=self.clock,
            ttl_s=self.config.session.lease_ttl_s,
            renew_s=self.config.session.lease_renew_s,
            idle_grace_s=self.config.session.idle_grace_s,
        )

    def start(self, address: str) -> None:
        """Begin to work and to be seen; the data socket listens at `address`."""
        self.address = address
        self._bench.writer.start()
        self._stepper.serve(self._works)
        self._keeper.tick()
        self._keeper.start()

    # Looking

    def runners(self) -> list[SessionRunner]:
        """Sessions that are here, ended ones until they are swept away."""
        with self._changed:
            return [runner for runner, _ in self._sessions.values()]

    def _works(self) -> list[Work]:
        return [work for _, works in self._sessions.values() for work in works]

    def healthy(self) -> bool:
        """Whether the engine thread lives and gets on."""
        return self._stepper.alive and self._stepper.busy_s() < ENGINE_STUCK_S

    def alive(self) -> bool:
        """Whether all threads of the replica live and get on."""
        return self.healthy() and self._keeper.alive

    def record(self) -> ReplicaRecord:
        """What this replica says of itself."""
        owned = [r for r in self.runners() if not r.shadow and r.ended is None]
        shape, measured = self.engine.shape, self._accounts.chunk_seconds
        leaving = "drained" if self._drained else "draining"
        return ReplicaRecord(
            id=self.replica_id,
            node_id=self._node_id,
            pid=self._pid,
            address=self.address,
            state="ready" if self._drain is None else leaving,
            model=shape.model,
            fingerprint=self.engine.fingerprint,
            sessions=tuple(sorted(r.session_id for r in owned)),
            chunk_seconds=measured,
            free_slots=0
            if self._drain is not None
            else free_slots(
                chunk_seconds=measured,
                chunk_s=shape.chunk_s,
                sessions=len(owned),
                limit=self.config.limits.sessions_per_replica,
            ),
        )

    @property
    def leaving(self) -> Reason | None:
        """Why this replica is to go away, if it is."""
        drain = self._drain
        return None if drain is None else drain.reason

    @property
    def least_slack_s(self) -> float:
        """How far the session with least slack is ahead of playout; inf if nobody waits."""
        return self._keeper.least_slack_s

    # Letting in

    def own(self, session_id: str, epoch: int, start: int | None = None) -> SessionRunner:
        """The session under `epoch`, started here if it was not; `start`: first chunk asked for.

        Raises `Fenced` unless this replica owns the session under exactly that epoch,
        `SegmentBeyondEnd` if `start` lies beyond the next chunk, `CapacityError`, `Draining`.
        """
        ttl_s = self.config.session.lease_ttl_s
        sent_s = self.clock.monotonic()
        record = self._directory.get(session_id)
        lease = Lease(session_id, self.replica_id, epoch)
        if record.state is SessionState.CLOSED:
            raise SessionClosed(f"session {session_id!r} is closed", param="session_id")
        # Renewing proves the ownership and starts the own count of the lease's time.
        if record.epoch != epoch or self._directory.renew([lease], ttl_s=ttl_s):
            raise Fenced(
                f"session {session_id!r}: {self.replica_id!r} does not own it under epoch {epoch}; "
                f"the epoch is {record.epoch} and the owner {record.owner!r}",
                param="epoch",
            )
        if start is not None and start > record.next_index:
            raise SegmentBeyondEnd(
                f"from={start} lies beyond the next chunk, {record.next_index}", param="from"
            )
        return self._let_in(record, LeaseView(lease, ttl_s, sent_s))

    def prepare(self, session_id: str) -> SessionRunner:
        """The session followed as a shadow, or as it runs here already."""
        record = self._directory.get(session_id)
        if record.state is SessionState.CLOSED:
            raise SessionClosed(f"session {session_id!r} is closed", param="session_id")
        return self._let_in(record, None)

    def _let_in(self, record: SessionRecord, lease: LeaseView | None) -> SessionRunner:
        with self._changed:
            here = self._sessions.get(record.id)
            runner = here[0] if here else None
            if runner is not None and runner.ended is None and not runner.now.releasing:
                held = runner.now.lease
                if lease is None:
                    return runner
                if held is not None and held.lease == lease.lease:
                    runner.apply(
                        partial(owner_events.renewed, lease=lease.lease, sent_s=lease.sent_s)
                    )
                    return runner
                if held is None or held.lease.epoch < lease.lease.epoch:
                    runner.adopt(lease, record)
                    return runner
                raise Fenced(
                    f"session {record.id!r} runs here under the newer epoch {held.lease.epoch}"
                )
            self._check_room(record.id)
            if here is not None:
                self._stepper.let_go(here[1])
            runner = self._new_runner(record, lease)
            works = (Progress(runner, self._bench), Backfill(runner, self._bench))
            self._sessions[record.id] = (runner, works)
            self._changed.notify_all()
            return runner

    def _check_room(self, session_id: str) -> None:
        if self._drain is not None:
            raise Draining(f"replica {self.replica_id!r} is draining and takes no sessions")
        limit = self.config.limits.sessions_per_replica
        others = [r for r in self.runners() if r.ended is None and r.session_id != session_id]
        if len(others) >= limit:
            raise CapacityError(
                f"replica {self.replica_id!r} runs {len(others)} sessions; "
                f"limits.sessions_per_replica is {limit}",
                retry_after_s=self.engine.shape.chunk_s,
            )

    def _new_runner(self, record: SessionRecord, lease: LeaseView | None) -> SessionRunner:
        return SessionRunner(
            record,
            lease,
            config=self.config.session,
            clock=self.clock,
            changed=self._changed,
        )

    def _drop(self, runner: SessionRunner) -> None:
        with self._changed:
            here = self._sessions.get(runner.session_id)
            if here is not None and here[0] is runner:
                self._stepper.let_go(here[1])
                del self._sessions[runner.session_id]

    # Giving up

    def drain(self, reason: Reason, within_s: float) -> float:
        """Take no sessions any more; those that nobody moves `within_s` from now are given up.

        Asked again, the earliest deadline counts. Returns the seconds that are left.
        """
        with self._changed:
            now_s, began = self.clock.monotonic(), self._drain is None
            self._drain = drain = draining.asked(self._drain, reason, now_s + within_s)
        if began:
            here = self._here()
            self._accounts.drain_began(reason.value, within_s, len(here))
            for runner in here:
                if runner.shadow:
                    runner.apply(partial(owner_events.drained, replica_id=self.replica_id))
            self._make_durable([r.session_id for r in here if not r.shadow])
        return max(0.0, drain.until_s - now_s)

    def _here(self) -> list[SessionRunner]:
        return [r for r in self.runners() if r.ended is None]

    def _drain_on(self, takers: bool = True) -> None:
        """Whatever follows by now from a drain, if there is one."""
        with self._changed:
            if self._drain is None or self._drained:
                return
            here, now_s = self._here(), self.clock.monotonic()
            found = draining.verdict(self._drain, now_s, sessions=len(here), takers=takers)
            if found is Verdict.WAIT:
                return
            if found is Verdict.GIVE_UP:
                self._drain = draining.gave_up(self._drain, now_s)
                self._parked = [r.session_id for r in here if not r.shadow]
            else:
                self._drained = True
        if found is Verdict.GIVE_UP:
            for runner in here:
                runner.apply(partial(owner_events.drained, replica_id=self.replica_id))
            return
        self._make_durable(self._parked)
        self._accounts.drained(len(self._parked))

    def _make_durable(self, session_ids: list[str]) -> None:
        """Let the newest snapshots of sessions be durable: they may rest on them for long."""
        for session_id in session_ids:
            try:
                make_newest_durable_soon(self._directory, self._store, session_id)
            except EchoError as error:
                self._accounts.store_failed(session_id, "durable", error)

    def _others_take(self) -> bool:
        """Whether another replica takes sessions of this model; True if it cannot be known."""
        model = self.engine.shape.model
        try:
            found = self._directory.replicas()
        except EchoError:
            return True
        return any(
            r.id != self.replica_id and r.state == "ready" and r.model in ("", model) for r in found
        )

    def leave(self, within_s: float, timeout_s: float = 5.0) -> None:
        """Drain, then say goodbye, stop all threads, close the stores.

        Waits for the sessions to be moved, `within_s` at most and only while somebody takes any,
        and `timeout_s` more for the chunks and the snapshots of those that are given up.
        """
        self.drain(Reason.STOP, within_s)
        while not self._drained:
            self._drain_on(self._others_take())
            with self._changed:
                until_s = self._drain.until_s + timeout_s if self._drain else 0.0
                left_s = until_s - self.clock.monotonic()
                if self._drained or left_s <= 0:
                    break
                self._changed.wait(min(left_s, LOOK_S))
        self.stop(timeout_s)
        try:
            self._directory.remove_replica(self.replica_id)
        except EchoError as error:
            # Its heartbeat runs out by itself.
            self._accounts.store_failed("", "goodbye", error)
        self._store.close()
        for directory in self._directories:
            directory.close()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop all threads where they stand, giving nothing up."""
        self._keeper.stop(timeout_s)
        self._stepper.stop(timeout_s)
        self._bench.writer.stop(timeout_s)
        self._fetchers.shutdown(wait=True, cancel_futures=True)
