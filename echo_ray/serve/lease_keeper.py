"""A thread that keeps the leases: renews them all in one call, and ends sessions that lost theirs.

It has a directory connection of its own, so nothing slow delays a renewal. It also sends the
replica's heartbeat, lets idle sessions go and forgets what has ended.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from echo_ray.clock import Clock
from echo_ray.errors import EchoError, Fenced
from echo_ray.serve.accounts import ProgressAccounts
from echo_ray.serve.runner import SessionRunner
from echo_ray.serve.telemetry import Telemetry, log
from echo_ray.session.records import Lease, OnIdle, ReplicaRecord, SessionState
from echo_ray.storage.interface import Directory

SHADOW_TTL_S = 30.0
"""A prepared session that nobody takes over is dropped after this."""


class LeaseKeeper:
    """The housekeeping of a replica, every `renew_s`."""

    def __init__(
        self,
        directory: Directory,
        *,
        runners: Callable[[], list[SessionRunner]],
        drop: Callable[[SessionRunner], None],
        record: Callable[[], ReplicaRecord],
        may_renew: Callable[[], bool],
        accounts: ProgressAccounts,
        telemetry: Telemetry,
        clock: Clock,
        ttl_s: float,
        renew_s: float,
    ) -> None:
        self._directory = directory
        self._runners = runners
        self._drop = drop
        self._record = record
        self._may_renew = may_renew
        self._accounts = accounts
        self._telemetry = telemetry
        self._clock = clock
        self._ttl_s = ttl_s
        self._renew_s = renew_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the thread; the leases run out or are released by others."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping.is_set():
            began_s = self._clock.monotonic()
            try:
                self.tick()
            except Exception as error:
                log(logging.ERROR, "housekeeping_failed", failure=error)
            self._stopping.wait(max(0.0, self._renew_s - (self._clock.monotonic() - began_s)))

    def tick(self) -> None:
        """One round: renew, expire, beat, let idle ones go."""
        runners = self._runners()
        if self._may_renew():
            self._renew(runners)
            self._beat()
        now_s = self._clock.monotonic()
        for runner in runners:
            self._expire(runner, now_s)
            self._let_go(runner, now_s)
            if runner.ended is not None:
                self._drop(runner)
        self._gauges(runners)

    def _renew(self, runners: list[SessionRunner]) -> None:
        held = {r.lease.lease: r for r in runners if r.lease is not None and r.ended is None}
        if not held:
            return
        sent_s = self._clock.monotonic()
        try:
            lost = set(self._directory.renew(list(held), ttl_s=self._ttl_s))
        except EchoError as error:
            self._accounts.store_failed("", "renew", error)
            return
        for lease, runner in held.items():
            if lease not in lost:
                runner.renewed(lease, sent_s)
            elif runner.lost(lease, self._taken(lease)):
                self._accounts.lease_lost(lease.session_id, "taken", self._taken(lease))

    @staticmethod
    def _taken(lease: Lease) -> Fenced:
        return Fenced(
            f"session {lease.session_id!r}: epoch {lease.epoch} does not own it any more; "
            "read the session again"
        )

    def _expire(self, runner: SessionRunner, now_s: float) -> None:
        view = runner.lease
        if view is None:
            if now_s - runner.arrived_s >= SHADOW_TTL_S:
                runner.end(Fenced(f"session {runner.session_id!r} was not taken over in time"))
            return
        if view.valid(now_s):
            return
        error = Fenced(
            f"session {runner.session_id!r}: the lease of epoch {view.lease.epoch} ran out"
        )
        if runner.lost(view.lease, error):
            self._accounts.lease_lost(runner.session_id, "expired", error)

    def _beat(self) -> None:
        try:
            self._directory.put_replica(self._record(), ttl_s=self._ttl_s)
        except EchoError as error:
            self._accounts.store_failed("", "heartbeat", error)

    @staticmethod
    def _let_go(runner: SessionRunner, now_s: float) -> None:
        verdict = runner.idle_verdict(now_s)
        if verdict is not None:
            closed = verdict is OnIdle.CLOSE
            runner.retire(SessionState.CLOSED if closed else SessionState.PAUSED)

    def _gauges(self, runners: list[SessionRunner]) -> None:
        states = {"running": 0, "loading": 0, "shadow": 0}
        oldest: list[float] = []
        for runner in runners:
            if runner.ended is not None:
                continue
            owned = "running" if runner.caught_up else "loading"
            states["shadow" if runner.shadow else owned] += 1
            if runner.newest_snapshot_at is not None:
                oldest.append(runner.newest_snapshot_at)
        for state, count in states.items():
            self._telemetry.set("sessions", count, state=state)
        self._telemetry.set("readers", sum(r.reader_count for r in runners))
        self._telemetry.set("session_slots", self._record().free_slots)
        if oldest:
            self._telemetry.set("oldest_snapshot_timestamp_seconds", min(oldest))
