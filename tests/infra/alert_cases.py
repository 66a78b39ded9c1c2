"""For each alert, what Prometheus sees in a good hour, in a bad one, and in two good ones after it.

Series are given per minute: a gauge's value, or what a counter grows by; None: it is not there.
"""

from __future__ import annotations

from dataclasses import dataclass

HOUR = 60


@dataclass(frozen=True, slots=True)
class Series:
    """One series by its selector, well and ill."""

    selector: str
    well: float | None
    ill: float | None
    grows: bool = False

    def values(self) -> str:
        """Four hours of it, in promtool's notation."""
        total, said = 0.0, []
        for value in [self.well] * HOUR + [self.ill] * HOUR + [self.well] * 2 * HOUR:
            total = total + (value or 0) if self.grows else value or 0
            said.append("_" if value is None else f"{total:g}")
        return " ".join(said)


class LastDone(Series):
    """A time of day at which something was done: always just now when well, long ago when ill."""

    def values(self) -> str:
        minutes = [*range(HOUR), *[HOUR] * HOUR, *range(2 * HOUR, 4 * HOUR)]
        return " ".join(str(60 * minute) for minute in minutes)


def gauge(selector: str, well: float | None, ill: float | None) -> Series:
    return Series(f"echo_ray_{selector}", well, ill)


def counter(selector: str, well: float, ill: float) -> Series:
    return Series(f"echo_ray_{selector}", well, ill, grows=True)


def quantile(name: str, low: str, high: str) -> list[Series]:
    """A histogram whose observations lie below `low` when well and between both when ill."""
    return [
        counter(f'{name}_bucket{{le="{low}"}}', 10, 0),
        counter(f'{name}_bucket{{le="{high}"}}', 10, 10),
        counter(f'{name}_bucket{{le="+Inf"}}', 10, 10),
    ]


LATE = [
    counter('chunks_total{on_time="true"}', 100, 70),
    counter('chunks_total{on_time="false"}', 0.5, 30),
]
RUNNING = gauge('build_info{role="router"}', 1, 1)

CASES: dict[str, list[Series]] = {
    "EchoRayStreamsStallingFast": LATE,
    "EchoRayStreamsStallingSlow": LATE,
    "EchoRayViewersStalling": [
        counter("viewer_stall_seconds_total", 1, 60),
        gauge('viewers{transport="websocket"}', 10, 10),
    ],
    "EchoRayReplicaBelowRealTime": [
        counter('generation_busy_seconds_total{stage="total",instance="a"}', 30, 70),
        counter('video_seconds_generated_total{instance="a"}', 60, 60),
    ],
    "EchoRayCapacityExhausted": [gauge("session_slots", 2, 0)],
    "EchoRaySessionsWaiting": [
        gauge('sessions_waiting{watched="true"}', 0, 2),
        gauge('sessions_waiting{watched="false"}', 0, 0),
    ],
    "EchoRayResumesFailing": [counter('session_resumes_total{outcome="failed"}', 0, 1)],
    "EchoRayResumeSlow": quantile("resume_duration_seconds", "1.0", "40.0"),
    "EchoRayFailoversMany": [counter('failovers_total{cause="broken"}', 0.1, 3)],
    "EchoRaySnapshotsTooOld": [LastDone("echo_ray_oldest_snapshot_timestamp_seconds", None, None)],
    "EchoRaySnapshotsFailing": [
        counter('snapshots_total{outcome="ok"}', 10, 5),
        counter('snapshots_total{outcome="failed"}', 0, 5),
    ],
    "EchoRaySnapshotTierFailing": [
        counter('snapshot_store_calls_total{tier="hot",op="write",outcome="ok"}', 10, 5),
        counter('snapshot_store_calls_total{tier="hot",op="write",outcome="failed"}', 0, 5),
    ],
    "EchoRaySnapshotDebt": [gauge("snapshot_debt", 3, 40)],
    "EchoRayStoreErrors": [counter('store_errors_total{op="progress"}', 1, 20)],
    "EchoRayLeasesExpiring": [counter('leases_lost_total{reason="expired"}', 0, 1)],
    "EchoRayFencedWrites": [counter('fenced_writes_total{instance="a"}', 0, 1)],
    "EchoRayDigestMismatches": [counter('digest_mismatches_total{instance="a"}', 0, 0.2)],
    "EchoRaySessionsNotRestored": [counter('sessions_restored_total{outcome="refused"}', 0, 0.1)],
    "EchoRaySessionsParked": [counter("sessions_parked_total", 0, 0.2)],
    "EchoRayMovesFailing": [counter('migrations_total{outcome="failed"}', 0, 1)],
    "EchoRayEngineFailing": [counter('engine_failures_total{instance="a"}', 0, 1)],
    "EchoRayPictureFailing": [
        counter("chunks_total", 100, 100),
        counter('drift_flags_total{flag="frozen"}', 0, 20),
    ],
    "EchoRayDriftHigh": quantile("drift_score", "2.0", "20.0"),
    "EchoRayEventsSlow": quantile("event_to_frame_seconds", "3.0", "20.0"),
    "EchoRayRequestsFailing": [
        counter('requests_total{status="200"}', 100, 80),
        counter('requests_total{status="503"}', 0, 20),
    ],
    "EchoRayTargetDown": [Series('up{job="echo-ray-replicas"}', 1, 0)],
    "EchoRayMetricsMissing": [RUNNING, gauge('build_info{role="generator"}', 1, None)],
}
