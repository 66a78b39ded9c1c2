"""What the engine thread tells the metrics and the log: one method per thing that happens."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping

from echo_ray.errors import ConflictError, EchoError, NotFoundError, SessionClosed
from echo_ray.serve.segments import Segment
from echo_ray.serve.telemetry import Telemetry, log
from echo_ray.serve.tracing import ChunkTracer
from echo_ray.session.capacity import smoothed
from echo_ray.session.engine_port import StreamShape
from echo_ray.session.fingerprint import NoFittingReplica
from echo_ray.storage.timed import StoreCall


def tell_store_calls(telemetry: Telemetry) -> Callable[[StoreCall], None]:
    """What counts the calls of a snapshot store, by tier."""

    def tell(call: StoreCall) -> None:
        tier, op = call.tier, call.op
        telemetry.count("snapshot_store_calls", tier=tier, op=op, outcome=call.outcome)
        telemetry.observe("snapshot_store_seconds", call.seconds, tier=tier, op=op)
        telemetry.count("snapshot_store_bytes", call.size_bytes, tier=tier, op=op)

    return tell


class ProgressAccounts:
    """Keeps the measured chunk time and writes metrics and log lines."""

    def __init__(self, telemetry: Telemetry, tracer: ChunkTracer | None = None) -> None:
        self._telemetry = telemetry
        self._tracer = tracer
        self._lock = threading.Lock()
        self._chunk_seconds = 0.0
        self._fallbacks: dict[str, int] = {}

    @property
    def chunk_seconds(self) -> float:
        """Measured compute seconds per chunk; 0 until one was made."""
        with self._lock:
            return self._chunk_seconds

    def measured(self, seconds: float) -> None:
        """One more chunk took `seconds`."""
        with self._lock:
            self._chunk_seconds = smoothed(self._chunk_seconds, seconds)

    def produced(self, segment: Segment, shape: StreamShape, *, late_s: float) -> None:
        """A chunk was committed, `late_s` after playout needed it (0 or less: in time)."""
        telemetry, chunk, seconds = self._telemetry, segment.chunk, segment.chunk_seconds
        media_s = chunk.num_frames / shape.fps
        self.measured(seconds)
        telemetry.count("frames_generated", chunk.num_frames)
        telemetry.count("video_seconds_generated", media_s)
        telemetry.count("chunks", on_time="true" if late_s <= 0 else "false")
        telemetry.observe("chunk_realtime_factor_ratio", seconds / media_s)
        telemetry.observe("chunk_latency_seconds", seconds, stage="total")
        telemetry.count("generation_busy_seconds", seconds, stage="total")
        for stage, stage_s in chunk.stage_seconds.items():
            telemetry.observe("chunk_latency_seconds", stage_s, stage=stage)
            telemetry.count("generation_busy_seconds", stage_s, stage=stage)
        if seconds > 0:
            telemetry.set("frames_per_second", chunk.num_frames / seconds)
        if late_s > 0:
            telemetry.count("stalls")
            telemetry.count("stall_seconds", late_s)
        telemetry.observe("drift_score", chunk.drift.score)
        for part, reading in chunk.drift.parts.items():
            if 0 <= reading < math.inf:
                telemetry.count("drift_parts", reading, part=part)
        for flag in chunk.drift.flags:
            telemetry.count("drift_flags", flag=flag)

    def traced(self, session_id: str, epoch: int, segment: Segment, late_s: float) -> None:
        """Tell the tracer of a committed chunk, if there is one."""
        if self._tracer is not None:
            self._tracer.chunk(session_id, epoch, segment, late_s)

    def memory(self, size_bytes: Mapping[str, int]) -> None:
        """What the engine takes now, by kind."""
        for kind, size in size_bytes.items():
            self._telemetry.set("device_memory_bytes", size, kind=kind)

    def kernels(self, fallbacks: Mapping[str, int]) -> None:
        """How often the engine went without a kernel, of each so far."""
        for kernel, count in fallbacks.items():
            more = count - self._fallbacks.get(kernel, 0)
            if more > 0:
                self._telemetry.count("kernel_fallbacks", more, kernel=kernel)
        self._fallbacks = dict(fallbacks)

    def first_chunk(self, seconds: float, *, resumed: bool) -> None:
        start = "resume" if resumed else "new"
        self._telemetry.observe("time_to_first_chunk_seconds", seconds, start=start)

    def replayed(self) -> None:
        self._telemetry.count("replayed_chunks")

    def resumed(self, session_id: str, seconds: float, replayed: int) -> None:
        """A session was taken over and stands where its viewers are."""
        self._telemetry.count("session_resumes", outcome="ok")
        self._telemetry.observe("resume_duration_seconds", seconds)
        log(logging.INFO, "resumed", session=session_id, seconds=seconds, replayed=replayed)

    def unfit(self, session_id: str, error: EchoError) -> None:
        """A session was not taken over, because this engine may not go on with it."""
        self._telemetry.count("session_resumes", outcome="unfit")
        log(logging.WARNING, "unfit", session=session_id, error=error.message)

    def not_resumed(self, error: Exception) -> None:
        """Bringing a session back failed, and not because it is somebody else's by now."""
        elsewhere = ConflictError | NoFittingReplica | NotFoundError | SessionClosed
        if not isinstance(error, elsewhere):
            self._telemetry.count("session_resumes", outcome="failed")

    def mismatch(
        self, session_id: str, index: int, digests: tuple[str, str], engines: tuple[str | None, str]
    ) -> None:
        """A replayed chunk is not the committed one; of both, what was committed stands first."""
        self._telemetry.count("digest_mismatches")
        log(
            logging.ERROR,
            "digest_mismatch",
            session=session_id,
            chunk=index,
            committed=digests[0],
            made=digests[1],
            committed_by=engines[0],
            made_by=engines[1],
        )

    def fenced(self, session_id: str, error: EchoError) -> None:
        """A write was refused because a newer epoch owns the session."""
        self._telemetry.count("fenced_writes")
        log(logging.WARNING, "fenced", session=session_id, error=error.message)

    def lease_lost(self, session_id: str, reason: str, error: EchoError) -> None:
        """A lease ran out (`expired`) or somebody else has it (`taken`)."""
        self._telemetry.count("leases_lost", reason=reason)
        log(logging.WARNING, "lease_lost", session=session_id, reason=reason, error=error.message)

    def store_failed(self, session_id: str, op: str, error: EchoError) -> None:
        """A store call failed; whoever made it tries again or goes without."""
        self._telemetry.count("store_errors", op=op)
        log(logging.WARNING, "store_failed", session=session_id, op=op, error=error.message)

    def engine_failed(self, session_id: str, in_a_row: int, error: Exception) -> None:
        """A step or a load failed; the session's state is gone."""
        self._telemetry.count("engine_failures")
        log(logging.ERROR, "engine_failed", failure=error, session=session_id, in_a_row=in_a_row)

    def snapshot_refused(self, session_id: str, snapshot_id: str, error: EchoError) -> None:
        """The engine would not load a snapshot; an older point is taken."""
        self._telemetry.count("snapshots", outcome="refused")
        log(
            logging.WARNING,
            "snapshot_refused",
            session=session_id,
            snapshot=snapshot_id,
            error=error.message,
        )

    def snapshot_failed(self, session_id: str, index: int, error: Exception) -> None:
        """A snapshot could not be made or written; the stream goes on."""
        self._telemetry.count("snapshots", outcome="failed")
        log(logging.WARNING, "snapshot_failed", session=session_id, point=index, error=str(error))

    def snapshot_written(self, session_id: str, index: int, size: int, seconds: float) -> None:
        """A snapshot rests in the store and the directory knows it."""
        self._telemetry.count("snapshots", outcome="ok")
        self._telemetry.observe("snapshot_duration_seconds", seconds, op="write")
        self._telemetry.observe("snapshot_size_bytes", size)
        log(
            logging.DEBUG,
            "snapshot",
            session=session_id,
            point=index,
            size_bytes=size,
            seconds=seconds,
        )

    def drain_began(self, reason: str, within_s: float, sessions: int) -> None:
        """The replica is to go away and takes no sessions any more."""
        self._telemetry.count("drains", reason=reason)
        log(logging.INFO, "drain_began", reason=reason, within_s=within_s, sessions=sessions)

    def drained(self, parked: int) -> None:
        """No session is left; `parked` of them nobody had moved in time."""
        self._telemetry.count("sessions_parked", parked)
        log(logging.INFO, "drained", parked=parked)
