"""A thread that puts snapshots at rest, and gives sessions up after their snapshots.

A snapshot may still be on its way from the device when it comes here; this thread waits for it, and
the engine's does not. The queue holds at most one snapshot per session, the newest: an older one
that has not been written yet is worth nothing beside it. A session's release waits behind its
snapshot.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from echo_ray.clock import Clock
from echo_ray.errors import Draining, EchoError, Fenced
from echo_ray.serve.accounts import ProgressAccounts
from echo_ray.serve.logs import about, log
from echo_ray.serve.retention import Pruner, make_newest_durable_soon
from echo_ray.serve.runner import SessionRunner
from echo_ray.session import owner_events
from echo_ray.session import snapshot as codec
from echo_ray.session.owning import LeaseOver
from echo_ray.session.records import SessionState, SnapshotRef
from echo_ray.session.snapshot import Snapshot
from echo_ray.storage.interface import Directory, SnapshotStore


@dataclass(frozen=True, slots=True)
class _Write:
    runner: SessionRunner
    snapshot: Callable[[], Snapshot]
    index: int


@dataclass(frozen=True, slots=True)
class _Release:
    runner: SessionRunner
    state: SessionState


class SnapshotWriter:
    """Writes snapshots and releases, one after the other, off the engine thread."""

    def __init__(
        self,
        directory: Directory,
        store: SnapshotStore,
        accounts: ProgressAccounts,
        clock: Clock,
        *,
        kept: int,
    ) -> None:
        self._directory = directory
        self._store = store
        self._accounts = accounts
        self._clock = clock
        self._pruner = Pruner(directory, store, accounts, kept=kept)
        self._jobs: deque[_Write | _Release] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._pruner.start()

    def submit(self, runner: SessionRunner, snapshot: Callable[[], Snapshot], index: int) -> None:
        """Write `snapshot`, the state at point `index`, some time soon, once it is there."""
        with self._wake:
            for at, job in enumerate(self._jobs):
                if isinstance(job, _Write) and job.runner is runner:
                    self._jobs[at] = _Write(runner, snapshot, index)
                    return
            self._jobs.append(_Write(runner, snapshot, index))
            self._wake.notify()

    def release(self, runner: SessionRunner, state: SessionState) -> None:
        """Give the session up, after its snapshot, and end it here."""
        with self._wake:
            self._jobs.append(_Release(runner, state))
            self._wake.notify()

    def stop(self, timeout_s: float) -> None:
        """Finish what is queued, then end the threads."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._pruner.stop(timeout_s)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._jobs and not self._stopping:
                    self._wake.wait()
                if not self._jobs:
                    return
                job = self._jobs.popleft()
            lease = job.runner.now.lease
            epoch = None if lease is None else lease.lease.epoch
            with about(session=job.runner.session_id, epoch=epoch):
                if isinstance(job, _Write):
                    self._write(job)
                else:
                    self._release(job)

    def _write(self, job: _Write) -> None:
        session_id = job.runner.session_id
        began_s = self._clock.monotonic()
        try:
            blob = codec.encode(job.snapshot())
            lease = job.runner.held()
            ref = SnapshotRef(
                id=f"p{job.index:010d}-e{lease.epoch}",
                session_id=session_id,
                chunk_index=job.index,
                size_bytes=len(blob),
                digest=hashlib.sha256(blob).hexdigest(),
                created_at=self._clock.wall(),
                store=self._store.name,
                epoch=lease.epoch,
            )
            self._store.put(session_id, ref.id, blob)
            self._record(job.runner, ref)
        except LeaseOver:
            return
        except Fenced as error:
            self._accounts.fenced(session_id, error)
            return
        except Exception as error:
            self._accounts.snapshot_failed(session_id, job.index, error)
            return
        job.runner.newest_snapshot_at = ref.created_at
        took_s = self._clock.monotonic() - began_s
        self._accounts.snapshot_written(session_id, job.index, len(blob), took_s)
        self._pruner.submit(job.runner)

    def _record(self, runner: SessionRunner, ref: SnapshotRef) -> None:
        try:
            self._directory.add_snapshot(runner.held(), ref)
        except EchoError:
            # Nobody lists these bytes; without this they would lie there for ever.
            self._store.delete(ref.session_id, ref.id)
            raise

    def _release(self, job: _Release) -> None:
        runner = job.runner
        told = Draining(
            f"session {runner.session_id!r} was given up here and is {job.state.value} now"
        )
        try:
            self._directory.release(runner.held(), state=job.state.value)
        except EchoError as error:
            # The lease runs out by itself then, and the session is found without an owner.
            self._accounts.store_failed(runner.session_id, "release", error)
        log(logging.INFO, "released", session=runner.session_id, state=job.state.value)
        runner.apply(partial(owner_events.ended, error=told))
        if job.state is SessionState.PAUSED:
            self._make_durable(runner.session_id)

    def _make_durable(self, session_id: str) -> None:
        """A paused session may rest for long, on its newest snapshot alone."""
        try:
            make_newest_durable_soon(self._directory, self._store, session_id)
        except EchoError as error:
            self._accounts.store_failed(session_id, "durable", error)
