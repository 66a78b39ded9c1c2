"""Every metric of the service in one table.

Metrics live on a registry object per process, handed to whoever measures; there is no global one.
Labels are bounded words, never a session, a viewer, a prompt or an error text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from echo_ray.errors import ConfigError
from echo_ray.serve.logs import LOGGER as LOGGER
from echo_ray.serve.logs import log as log
from echo_ray.serve.logs import log_as_json as log_as_json
from echo_ray.session.pulling import Cause

PREFIX = "echo_ray_"
CONTENT_TYPE = CONTENT_TYPE_LATEST

_CHUNK_S = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0)
_RATIO = (0.05, 0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0)
_START_S = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 20.0, 40.0)
_SCORE = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0)
_BYTES = tuple(float(64 * 1024 * 4**i) for i in range(9))
_IO_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One row of the table; `name` without the prefix and without a counter's `_total`."""

    name: str
    kind: str
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    values: tuple[str, ...] = ()
    """Values of a lone label whose series stand at 0 from the start, so that rates see the first
    event."""

    @property
    def series(self) -> str:
        """The name as it is scraped."""
        return f"{PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"


REPLICAS: tuple[MetricSpec, ...] = (
    MetricSpec("frames_generated", "counter", "frames", "Frames committed; the rate is FPS."),
    MetricSpec("video_seconds_generated", "counter", "seconds", "Media time committed."),
    MetricSpec(
        "generation_busy_seconds", "counter", "seconds", "Engine time of new chunks.", ("stage",)
    ),
    MetricSpec(
        "chunks", "counter", "chunks", "Chunks committed.", ("on_time",), (), ("true", "false")
    ),
    MetricSpec("frames_per_second", "gauge", "frames", "Frames of the latest chunk per second."),
    MetricSpec(
        "chunk_realtime_factor_ratio",
        "histogram",
        "ratio",
        "Compute time over media time of a chunk; below 1 is faster than playout.",
        buckets=_RATIO,
    ),
    MetricSpec(
        "chunk_latency_seconds",
        "histogram",
        "seconds",
        "Time of a chunk, by stage; stage `total` is the whole step.",
        ("stage",),
        _CHUNK_S,
    ),
    MetricSpec("encode_seconds", "histogram", "seconds", "Encoding.", ("format",), _IO_S),
    MetricSpec(
        "time_to_first_chunk_seconds",
        "histogram",
        "seconds",
        "From a session's arrival here to its first published chunk.",
        ("start",),
        _START_S,
        ("new", "resume"),
    ),
    MetricSpec(
        "playout_slack_seconds",
        "gauge",
        "seconds",
        "Until the next chunk is needed, of the realtime session here that has least.",
    ),
    MetricSpec("stalls", "counter", "stalls", "Chunks published after playout needed them."),
    MetricSpec("stall_seconds", "counter", "seconds", "How late those chunks were."),
    MetricSpec("sessions", "gauge", "sessions", "Sessions of this replica.", ("state",)),
    MetricSpec("session_slots", "gauge", "sessions", "Further realtime sessions with room."),
    MetricSpec("drift_score", "histogram", "score", "Drift of each new chunk.", (), _SCORE),
    MetricSpec(
        "drift_parts",
        "counter",
        "readings",
        "Sum of each reading of the meter; over chunks it is the mean.",
        ("part",),
    ),
    MetricSpec(
        "drift_flags",
        "counter",
        "chunks",
        "Chunks flagged by the meter.",
        ("flag",),
        (),
        ("frozen", "washed_out", "exploded"),
    ),
    MetricSpec(
        "snapshots",
        "counter",
        "snapshots",
        "Snapshots written, or not readable.",
        ("outcome",),
        (),
        ("ok", "failed", "refused", "unreadable"),
    ),
    MetricSpec(
        "snapshot_duration_seconds",
        "histogram",
        "seconds",
        "Time to write or read a snapshot.",
        ("op",),
        _IO_S,
        ("write", "read"),
    ),
    MetricSpec("snapshot_size_bytes", "histogram", "bytes", "Size at rest.", (), _BYTES),
    MetricSpec(
        "oldest_snapshot_timestamp_seconds",
        "gauge",
        "seconds",
        "Oldest of the newest snapshots of live sessions; age is time() minus this.",
    ),
    MetricSpec(
        "session_resumes",
        "counter",
        "sessions",
        "Sessions taken over.",
        ("outcome",),
        (),
        ("ok", "failed", "unfit"),
    ),
    MetricSpec(
        "resume_duration_seconds",
        "histogram",
        "seconds",
        "From a session's arrival here to the end of its replay.",
        (),
        _START_S,
    ),
    MetricSpec("replayed_chunks", "counter", "chunks", "Chunks made again to catch up."),
    MetricSpec("digest_mismatches", "counter", "chunks", "Replayed chunks that differ."),
    MetricSpec("fenced_writes", "counter", "writes", "Writes refused: a newer epoch owns it."),
    MetricSpec(
        "leases_lost",
        "counter",
        "leases",
        "Leases lost or run out.",
        ("reason",),
        (),
        ("expired", "taken"),
    ),
    MetricSpec("engine_failures", "counter", "steps", "Engine steps or loads that failed."),
    MetricSpec(
        "kernel_fallbacks",
        "counter",
        "calls",
        "Calls of a kernel that ran its plain form because it does not compile or launch here; "
        "as cuda_graph, forwards or decodings that could not be recorded.",
        ("kernel",),
    ),
    MetricSpec("state_bytes", "gauge", "bytes", "Memory of the sessions' states here."),
    MetricSpec("device_memory_bytes", "gauge", "bytes", "Memory of the engine.", ("kind",)),
    MetricSpec("readers", "gauge", "readers", "Open pulls on this replica."),
    MetricSpec("drains", "counter", "drains", "Drains of this replica begun.", ("reason",)),
    MetricSpec("sessions_parked", "counter", "sessions", "Given up by a drain, not moved in time."),
)
"""What replicas measure."""
ROUTERS: tuple[MetricSpec, ...] = (
    MetricSpec(
        "event_to_frame_seconds",
        "histogram",
        "seconds",
        "From an event's acknowledgement to the first segment made with it, at its router.",
        buckets=_START_S,
    ),
    MetricSpec(
        "viewer_stalls", "counter", "stalls", "Segments that reached a router after playout."
    ),
    MetricSpec("viewer_stall_seconds", "counter", "seconds", "How late those segments were."),
    MetricSpec("sessions_open", "gauge", "sessions", "Sessions that are not closed, anywhere."),
    MetricSpec(
        "sessions_waiting",
        "gauge",
        "sessions",
        "Sessions without an owner: those watched at this router, and those nobody watches.",
        ("watched",),
    ),
    MetricSpec(
        "sessions_restored",
        "counter",
        "sessions",
        "After Redis lost everything.",
        ("outcome",),
        (),
        ("ok", "refused"),
    ),
    MetricSpec("viewers", "gauge", "viewers", "Viewers of this router.", ("transport",)),
    MetricSpec(
        "failovers",
        "counter",
        "sessions",
        "Owners given up by this router.",
        ("cause",),
        (),
        tuple(Cause),
    ),
    MetricSpec(
        "failover_seconds",
        "histogram",
        "seconds",
        "From giving an owner up to the next chunk of another.",
        (),
        _START_S,
    ),
    MetricSpec(
        "handover_gap_seconds",
        "histogram",
        "seconds",
        "From the last segment of one owner to the first of the next, as viewers get them.",
        ("cause",),
        _START_S,
        ("failover", "move"),
    ),
    MetricSpec(
        "migrations",
        "counter",
        "sessions",
        "Planned moves.",
        ("outcome",),
        (),
        ("ok", "failed", "overtaken"),
    ),
    MetricSpec("requests", "counter", "requests", "HTTP requests.", ("route", "status")),
    MetricSpec(
        "admission_rejections",
        "counter",
        "requests",
        "Sessions not admitted.",
        ("reason",),
        (),
        ("capacity_exhausted", "no_replica", "quota_exceeded"),
    ),
)
"""What routers measure."""
BOTH: tuple[MetricSpec, ...] = (
    MetricSpec(
        "snapshot_store_seconds",
        "histogram",
        "seconds",
        "Time of a write to or a read from one tier of the snapshot store.",
        ("tier", "op"),
        _IO_S,
    ),
    MetricSpec(
        "snapshot_store_bytes", "counter", "bytes", "Bytes of those that went well.", ("tier", "op")
    ),
    MetricSpec(
        "snapshot_store_calls",
        "counter",
        "calls",
        "Writes and reads by how they ended.",
        ("tier", "op", "outcome"),
    ),
    MetricSpec("snapshot_debt", "gauge", "snapshots", "Durable copies still to be made."),
    MetricSpec(
        "snapshot_tier_events",
        "counter",
        "events",
        "Failures, misses and copies between the hot and the durable snapshot store.",
        ("event",),
    ),
    MetricSpec("store_errors", "counter", "calls", "Store calls that failed.", ("op",)),
    MetricSpec("bytes_sent", "counter", "bytes", "Segment bytes sent.", ("format",)),
    MetricSpec("build_info", "gauge", "1", "What runs here; always 1.", ("version", "role")),
)
TABLE = REPLICAS + ROUTERS + BOTH

_Metric = Counter | Gauge | Histogram


class Telemetry:
    """The metrics of one process, by the names of the table.

    A replica has the rows of replicas only, a router those of routers: a gauge that nobody sets
    would say 0.
    """

    def __init__(self, table: tuple[MetricSpec, ...] = TABLE) -> None:
        self.registry = CollectorRegistry()
        self._specs: Mapping[str, MetricSpec] = {spec.name: spec for spec in table}
        self._metrics: dict[str, _Metric] = {spec.name: self._built(spec) for spec in table}
        for spec in table:
            for value in spec.values:
                self._metrics[spec.name].labels(value)

    def _built(self, spec: MetricSpec) -> _Metric:
        name = PREFIX + spec.name
        if spec.kind == "counter":
            return Counter(name, spec.help, spec.labels, registry=self.registry)
        if spec.kind == "gauge":
            return Gauge(name, spec.help, spec.labels, registry=self.registry)
        if spec.kind == "histogram":
            return Histogram(
                name, spec.help, spec.labels, registry=self.registry, buckets=spec.buckets
            )
        raise ConfigError(f"metric {spec.name}: kind {spec.kind!r}: counter, gauge or histogram")

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        metric = self._find(name, labels)
        if not isinstance(metric, Counter):
            raise self._wrong_kind(name, "counter")
        metric.inc(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        metric = self._find(name, labels)
        if not isinstance(metric, Gauge):
            raise self._wrong_kind(name, "gauge")
        metric.set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add one observation to a histogram."""
        metric = self._find(name, labels)
        if not isinstance(metric, Histogram):
            raise self._wrong_kind(name, "histogram")
        metric.observe(value)

    def value(self, series: str, **labels: str) -> float:
        """The present value of a scraped series, 0 if it does not exist yet."""
        return self.registry.get_sample_value(series, labels) or 0.0

    def render(self) -> bytes:
        """The body of `/metrics`."""
        return generate_latest(self.registry)

    def _find(self, name: str, labels: Mapping[str, str]) -> _Metric:
        metric = self._metrics.get(name)
        if metric is None:
            raise ConfigError(f"metric {name!r} is not in the table of telemetry.py; add it there")
        spec = self._specs[name]
        if set(labels) != set(spec.labels):
            raise ConfigError(f"metric {name}: labels {sorted(labels)}, not {sorted(spec.labels)}")
        return metric.labels(**labels) if labels else metric

    def _wrong_kind(self, name: str, kind: str) -> ConfigError:
        return ConfigError(f"metric {name} is a {self._specs[name].kind}, not a {kind}")
