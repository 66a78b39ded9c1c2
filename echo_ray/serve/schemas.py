"""The REST resources as schemas: what OpenAPI shows, and the shapes that clients rely on.

Requests refuse unknown fields and wrong JSON types; what a value may be is decided in
`session/rules.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from echo_ray.session.engine_port import StreamShape
from echo_ray.session.records import ReplicaRecord, SessionRecord, SnapshotRef
from echo_ray.wire import MAX_INDEX


class Request(BaseModel):
    """A request body: exactly these fields, exactly these types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class NewSession(Request):
    prompt: str = Field(examples=["a red circle moves left on black"])
    seed: int | None = Field(None, description="0 to 2**63 - 1; drawn if missing")
    model: str | None = None
    pace: Literal["realtime", "max"] | None = None
    on_idle: Literal["pause", "continue", "close"] | None = None
    labels: dict[str, str] | None = None


class EventBody(Request):
    prompt: str


class NewEvent(Request):
    event_id: str = Field(description="chosen by the client; sending it again is harmless")
    event: EventBody
    at_chunk: int | None = Field(
        None, ge=0, le=MAX_INDEX, description="take effect exactly there; otherwise at once"
    )


class ForkRequest(Request):
    chunk: int | None = Field(
        None, ge=0, le=MAX_INDEX, description="begin there; with the next chunk if missing"
    )
    prompt: str | None = Field(None, description="switch to it at that chunk")
    pace: Literal["realtime", "max"] | None = None
    on_idle: Literal["pause", "continue", "close"] | None = None
    labels: dict[str, str] | None = None


class RewindRequest(Request):
    chunk: int = Field(ge=0, le=MAX_INDEX)


class MoveRequest(Request):
    to: str | None = Field(None, description="replica id; the best other one if missing")


class SessionView(BaseModel):
    id: str
    state: str
    model: str
    prompt: str
    seed: int
    fps: int
    width: int
    height: int
    frames_per_chunk: int
    next_chunk: int
    created_at: float
    pace: str
    on_idle: str
    labels: dict[str, str]
    clip_frames: int = Field(description="frames that are the uploaded clip; 0 without one")
    owner: str | None
    epoch: int

    @classmethod
    def of(cls, record: SessionRecord, shape: StreamShape) -> SessionView:
        return cls(
            id=record.id,
            state=record.state.value,
            model=record.model,
            prompt=record.prompt,
            seed=record.seed,
            fps=shape.fps,
            width=shape.width,
            height=shape.height,
            frames_per_chunk=shape.frames_per_chunk,
            next_chunk=record.next_index,
            created_at=record.created_at,
            pace=record.pace.value,
            on_idle=record.on_idle.value,
            labels=dict(record.labels),
            clip_frames=record.clip.frames if record.clip else 0,
            owner=record.owner,
            epoch=record.epoch,
        )


class ForkPoint(BaseModel):
    session: str
    chunk: int


class ForkView(SessionView):
    forked_from: ForkPoint

    @classmethod
    def made(cls, record: SessionRecord, source: str, shape: StreamShape) -> ForkView:
        """The answer to a fork: `record` as it was when it was made."""
        begun = ForkPoint(session=source, chunk=record.next_index)
        return cls(**SessionView.of(record, shape).model_dump(), forked_from=begun)


class SessionList(BaseModel):
    sessions: list[SessionView]


class EventQueued(BaseModel):
    event_id: str
    effective_chunk: int


class SnapshotView(BaseModel):
    id: str
    chunk_index: int
    bytes: int
    digest: str
    created_at: float
    store: str
    pinned: bool

    @classmethod
    def of(cls, ref: SnapshotRef) -> SnapshotView:
        return cls(
            id=ref.id,
            chunk_index=ref.chunk_index,
            bytes=ref.size_bytes,
            digest=ref.digest,
            created_at=ref.created_at,
            store=ref.store,
            pinned=ref.pinned,
        )


class SnapshotList(BaseModel):
    snapshots: list[SnapshotView]


class ReplicaView(BaseModel):
    id: str
    node_id: str
    pid: int
    address: str
    state: str
    sessions: list[str]
    chunk_seconds: float
    free_slots: int
    fingerprint: str

    @classmethod
    def of(cls, record: ReplicaRecord) -> ReplicaView:
        return cls(
            id=record.id,
            node_id=record.node_id,
            pid=record.pid,
            address=record.address,
            state=record.state,
            sessions=list(record.sessions),
            chunk_seconds=record.chunk_seconds,
            free_slots=record.free_slots,
            fingerprint=record.fingerprint,
        )


class ScrapeTarget(BaseModel):
    """One entry of Prometheus' HTTP service discovery."""

    targets: list[str]
    labels: dict[str, str]

    @classmethod
    def of(cls, record: ReplicaRecord) -> ScrapeTarget:
        labels = {"replica": record.id, "node": record.node_id}
        return cls(targets=[record.address], labels=labels)


class ReplicaList(BaseModel):
    replicas: list[ReplicaView]


class MoveView(BaseModel):
    id: str
    source: str
    target: str
    epoch: int
    moved: bool


class ModelView(BaseModel):
    id: str
    fps: int
    width: int
    height: int
    frames_per_chunk: int
    first_chunk_frames: int
    point_every: int


class ModelList(BaseModel):
    models: list[ModelView]


class ErrorBody(BaseModel):
    message: str
    type: str
    code: str
    param: str | None
    retryable: bool
    retry_after_s: float | None


class ErrorView(BaseModel):
    error: ErrorBody


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorView} for status in (400, 404, 409, 410, 413, 429, 503)
}
"""The error answers that every resource may give, for OpenAPI."""
