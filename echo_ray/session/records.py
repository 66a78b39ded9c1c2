"""The values that stores keep: sessions, controls, commits, snapshots, replicas, leases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class SessionState(StrEnum):
    """Where a session stands in its life."""

    LIVE = "live"
    """Has an owner, or waits for a router to find one."""
    PAUSED = "paused"
    """Costs no GPU; point and control log are at rest. Watching it again resumes it."""
    CLOSED = "closed"


class Pace(StrEnum):
    REALTIME = "realtime"
    MAX = "max"


class OnIdle(StrEnum):
    """What happens when the last viewer has left."""

    PAUSE = "pause"
    CONTINUE = "continue"
    CLOSE = "close"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRef:
    """The uploaded clip that a session begins with, as a blob beside its snapshots."""

    id: str
    sha256: str
    """Of the bytes that were uploaded."""
    frames: int
    """How many of the stream's frames it became; a number of whole chunks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionRecord:
    """One row of the session directory."""

    id: str
    model: str
    prompt: str
    seed: int
    pace: Pace = Pace.REALTIME
    on_idle: OnIdle = OnIdle.PAUSE
    labels: Mapping[str, str] = field(default_factory=dict)
    tenant: str = ""
    """Whose it is; empty: nobody's in particular, made while access was off."""
    clip: ClipRef | None = None
    created_at: float = 0.0
    state: SessionState = SessionState.LIVE
    owner: str | None = None
    epoch: int = 0
    """Fencing token: raised by every claim. A write that carries another epoch is refused."""
    lease_until: float = 0.0
    """Wall time at which the owner's lease runs out."""
    next_index: int = 0
    """The first chunk that is not committed."""
    sealed: int = 0
    """The first chunk whose controls are still open; next_index <= sealed <= next_index + 1."""
    fingerprint: str | None = None
    """Numerics of the engine that made the last commit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlEntry:
    """One durable entry of a session's control log, pinned to the chunk where it takes effect."""

    event_id: str
    chunk: int
    prompt: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotRef:
    """Where a session's state at point `chunk_index` rests."""

    id: str
    session_id: str
    chunk_index: int
    """Chunks generated before this state: the next chunk from it has this index."""
    size_bytes: int
    digest: str
    created_at: float
    store: str
    epoch: int
    pinned: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaRecord:
    """What a generator replica says of itself, renewed with every heartbeat."""

    id: str
    node_id: str
    pid: int
    address: str
    """`host:port` of the replica's own data socket."""
    state: str = "ready"
    """ready, draining, or drained once no session is left."""
    model: str = ""
    fingerprint: str = ""
    """Of its engine; empty: an older release, which does not say."""
    sessions: tuple[str, ...] = ()
    chunk_seconds: float = 0.0
    """Measured seconds of compute per chunk (an exponential mean); 0 until one was made."""
    free_slots: int = 0
    """How many more realtime sessions the measured chunk time leaves room for."""
    alive_until: float = 0.0
    """Wall time after which the replica counts as gone."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A claim on a session: who writes, under which epoch."""

    session_id: str
    owner: str
    epoch: int
