"""A thread that keeps the leases: renews them all in one call, and ends sessions that lost theirs.

It has a directory connection of its own, so nothing slow delays a renewal. It also sends the
replica's heartbeat, lets idle sessions go and forgets what has ended.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from functools import partial

from echo_ray.clock import Clock
from echo_ray.errors import EchoError, Fenced
from echo_ray.serve.accounts import ProgressAccounts
from echo_ray.serve.runner import Event, SessionRunner
from echo_ray.serve.telemetry import Telemetry, log
from echo_ray.serve.tier_accounts import TierAccounts
from echo_ray.session import owner_events
from echo_ray.session.engine_port import StreamShape
from echo_ray.session.owner_events import Effect
from echo_ray.session.records import Lease, ReplicaRecord
from echo_ray.storage.interface import Directory


class LeaseKeeper:
    """The housekeeping of a replica, every `renew_s`."""

    def __init__(
        self,
        directory: Directory,
        *,
        runners: Callable[[], list[SessionRunner]],
        drop: Callable[[SessionRunner], None],
        record: Callable[[], ReplicaRecord],
        drain_on: Callable[[], None],
        may_renew: Callable[[], bool],
        accounts: ProgressAccounts,
        telemetry: Telemetry,
        tiers: TierAccounts,
        shape: StreamShape,
        clock: Clock,
        ttl_s: float,
        renew_s: float,
        idle_grace_s: float,
    ) -> None:
        self._directory = directory
        self._runners = runners
        self._drop = drop
        self._record = record
        self._drain_on = drain_on
        self._may_renew = may_renew
        self._accounts = accounts
        self._telemetry = telemetry
        self._tiers = tiers
        self._shape = shape
        self._clock = clock
        self._ttl_s = ttl_s
        self._renew_s = renew_s
        self._grace_s = idle_grace_s
        self.least_slack_s = math.inf
        """Until the next chunk is needed, of the session that has least; inf: nobody waits."""
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
        """One round: renew, expire, beat, let idle ones go, go on with a drain."""
        runners = self._runners()
        if self._may_renew():
            self._renew(runners)
            self._beat()
        now_s = self._clock.monotonic()
        for runner in runners:
            self._told(runner, "expired", partial(owner_events.expired, now_s=now_s))
            runner.apply(partial(owner_events.idled, now_s=now_s, grace_s=self._grace_s))
            if runner.ended is not None:
                self._drop(runner)
        self._drain_on()
        self._gauges(runners)

    def _renew(self, runners: list[SessionRunner]) -> None:
        held = {
            r.now.lease.lease: r for r in runners if r.now.lease is not None and r.ended is None
        }
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
                runner.apply(partial(owner_events.renewed, lease=lease, sent_s=sent_s))
            else:
                taken = self._taken(lease)
                self._told(runner, "taken", partial(owner_events.lost, lease=lease, error=taken))

    @staticmethod
    def _taken(lease: Lease) -> Fenced:
        return Fenced(
            f"session {lease.session_id!r}: epoch {lease.epoch} does not own it any more; "
            "read the session again"
        )

    def _told(self, runner: SessionRunner, reason: str, event: Event) -> None:
        """Let an event have happened that may cost the lease, and count it if it did."""
        effects = runner.apply(event)
        if Effect.LOST in effects and runner.ended is not None:
            self._accounts.lease_lost(runner.session_id, reason, runner.ended)

    def _beat(self) -> None:
        try:
            self._directory.put_replica(self._record(), ttl_s=self._ttl_s)
        except EchoError as error:
            self._accounts.store_failed("", "heartbeat", error)

    def _gauges(self, runners: list[SessionRunner]) -> None:
        states = {"running": 0, "loading": 0, "shadow": 0}
        oldest: list[float] = []
        for runner in runners:
            if runner.ended is not None:
                continue
            owned = "running" if runner.now.caught_up else "loading"
            states["shadow" if runner.shadow else owned] += 1
            if self._shape.point_every and self._is_wanted(runner):
                oldest.append(self._saved_at(runner))
        for state, count in states.items():
            self._telemetry.set("sessions", count, state=state)
        self._telemetry.set("state_bytes", sum(r.state_bytes for r in runners))
        slack = [s for r in runners if (s := self._slack_s(r)) is not None]
        # Of nobody, slack is without end; a lead would be a guess.
        self.least_slack_s = min(slack, default=math.inf)
        self._telemetry.set("playout_slack_seconds", self.least_slack_s)
        self._telemetry.set("readers", sum(r.reader_count for r in runners))
        self._telemetry.set("session_slots", self._record().free_slots)
        # A replica whose last session left has no snapshot that grows old.
        self._telemetry.set("oldest_snapshot_timestamp_seconds", min(oldest, default=math.inf))
        self._tiers.tell()

    def _slack_s(self, runner: SessionRunner) -> float | None:
        """How long playout can still wait for the session's next chunk; None: nobody waits."""
        now = runner.now
        if now.playout is None or runner.wanted() is None or not self._is_wanted(runner):
            return None
        return now.playout.due_s(self._shape.start_s(now.committed)) - self._clock.monotonic()

    @staticmethod
    def _is_wanted(runner: SessionRunner) -> bool:
        """Whether the session is owned here and its next chunk is to be made."""
        now, want = runner.now, runner.wanted()
        if now.ended is not None or runner.shadow or now.held_back or not now.caught_up:
            return False
        return want is None or now.committed < want

    def _saved_at(self, runner: SessionRunner) -> float:
        """Wall time of the newest snapshot, or of the arrival if there is none."""
        if runner.newest_snapshot_at is not None:
            return runner.newest_snapshot_at
        return self._clock.wall() - (self._clock.monotonic() - runner.now.arrived_s)
