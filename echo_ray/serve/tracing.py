"""Optional traces: one span per committed chunk, sent to an OpenTelemetry collector over HTTP.

Nothing here waits for the collector. Spans queue up to a bound and are dropped beyond it. The
packages are imported only where tracing is on.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from echo_ray import __version__
from echo_ray.clock import Clock
from echo_ray.config_telemetry import TelemetrySection
from echo_ray.errors import ConfigError
from echo_ray.serve.segments import Segment

if TYPE_CHECKING:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

EXPORT_S = 5.0
"""A collector that takes longer for a batch loses it."""
FAREWELL_S = 2.0
"""A replica that goes waits so long for its last spans to be taken."""
_NS = 1_000_000_000


class ChunkTracer:
    """The spans of one replica."""

    def __init__(self, exporter: OTLPSpanExporter, replica_id: str, clock: Clock) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        who = {
            "service.name": "echo-ray",
            "service.version": __version__,
            "service.instance.id": replica_id,
        }
        self._provider = TracerProvider(resource=Resource(who), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("echo_ray")
        self._clock = clock

    def chunk(self, session_id: str, epoch: int, segment: Segment, late_s: float) -> None:
        """Tell of a chunk that has just been committed."""
        chunk, end_ns = segment.chunk, int(self._clock.wall() * _NS)
        stages = {f"echo_ray.stage.{k}_s": v for k, v in chunk.stage_seconds.items()}
        span = self._tracer.start_span(
            "chunk",
            start_time=end_ns - int(segment.chunk_seconds * _NS),
            attributes={
                "echo_ray.session": session_id,
                "echo_ray.epoch": epoch,
                "echo_ray.chunk": chunk.index,
                "echo_ray.late_s": late_s,
                "echo_ray.drift_score": chunk.drift.score,
                **stages,
            },
        )
        span.end(end_ns)

    def close(self) -> None:
        """Send what waits, as far as the collector takes it in time."""
        last = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        last.start()
        last.join(FAREWELL_S)


def open_tracer(section: TelemetrySection, replica_id: str, clock: Clock) -> ChunkTracer | None:
    """The tracer of a configuration, None if tracing is off. Raises as `check_tracing`."""
    if section.otlp_endpoint is None:
        return None
    check_tracing(section)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    exporter = OTLPSpanExporter(endpoint=section.otlp_endpoint, timeout=EXPORT_S)
    return ChunkTracer(exporter, replica_id, clock)


def check_tracing(section: TelemetrySection) -> None:
    """Raise `ConfigError` if tracing is on and its packages are missing."""
    if section.otlp_endpoint is None:
        return
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"telemetry.otlp_endpoint: {error.name} is not installed; pip install "
            "'echo-ray[tracing]', or remove the key",
            param="telemetry.otlp_endpoint",
        ) from error
