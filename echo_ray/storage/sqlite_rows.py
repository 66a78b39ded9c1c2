"""How session records, snapshot references and replicas lie in SQLite rows.

What changes or is searched for has a column of its own; the rest of a record is one JSON text.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from echo_ray.session.control_log import LoggedControl
from echo_ray.session.records import (
    ClipRef,
    ControlEntry,
    OnIdle,
    Pace,
    ReplicaRecord,
    SessionRecord,
    SessionState,
    SnapshotRef,
)
from echo_ray.storage.sqlite_file import RowDamaged

SCHEMA = """
CREATE TABLE sessions (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    created_at REAL NOT NULL,
    body TEXT NOT NULL,
    state TEXT NOT NULL,
    owner TEXT,
    epoch INTEGER NOT NULL,
    lease_until REAL NOT NULL,
    next_index INTEGER NOT NULL,
    sealed INTEGER NOT NULL,
    fingerprint TEXT
);
CREATE TABLE controls (
    position INTEGER PRIMARY KEY,
    session INTEGER NOT NULL REFERENCES sessions (seq) ON DELETE CASCADE,
    event_id TEXT NOT NULL,
    chunk INTEGER NOT NULL,
    prompt TEXT NOT NULL,
    asked INTEGER,
    UNIQUE (session, event_id)
);
CREATE INDEX controls_by_chunk ON controls (session, chunk, position);
CREATE TABLE commits (
    session INTEGER NOT NULL REFERENCES sessions (seq) ON DELETE CASCADE,
    chunk INTEGER NOT NULL,
    digest TEXT NOT NULL,
    PRIMARY KEY (session, chunk)
) WITHOUT ROWID;
CREATE TABLE snapshots (
    position INTEGER PRIMARY KEY,
    session INTEGER NOT NULL REFERENCES sessions (seq) ON DELETE CASCADE,
    id TEXT NOT NULL,
    chunk_index INTEGER NOT NULL,
    pinned INTEGER NOT NULL,
    body TEXT NOT NULL,
    UNIQUE (session, id)
);
CREATE TABLE replicas (
    id TEXT PRIMARY KEY,
    alive_until REAL NOT NULL,
    body TEXT NOT NULL
) WITHOUT ROWID
"""
MUTABLE = ("state", "owner", "epoch", "lease_until", "next_index", "sealed", "fingerprint")
_REPLICA_FIELDS = frozenset(f.name for f in fields(ReplicaRecord))
SESSION_COLUMNS = f"seq, id, created_at, body, {', '.join(MUTABLE)}"
UPDATE_SESSION = f"UPDATE sessions SET {', '.join(f'{c} = ?' for c in MUTABLE)} WHERE seq = ?"
INSERT_SESSION = (
    f"INSERT INTO sessions (id, created_at, body, {', '.join(MUTABLE)}) "
    f"VALUES (?, ?, ?{', ?' * len(MUTABLE)})"
)


def mutable_values(record: SessionRecord) -> tuple[Any, ...]:
    """The values of the columns that change, in their order."""
    return tuple(
        record.state.value if name == "state" else getattr(record, name) for name in MUTABLE
    )


def session_values(record: SessionRecord) -> tuple[Any, ...]:
    """The values of a new session's columns, in their order."""
    body = {
        "model": record.model,
        "prompt": record.prompt,
        "seed": record.seed,
        "pace": record.pace.value,
        "on_idle": record.on_idle.value,
        "labels": dict(record.labels),
        "tenant": record.tenant,
        "clip": None if record.clip is None else asdict(record.clip),
    }
    return record.id, record.created_at, json.dumps(body), *mutable_values(record)


def session_from(row: tuple[Any, ...]) -> tuple[int, SessionRecord]:
    """The row's number and the record in it. Raises `RowDamaged`."""
    seq, id_, created_at, text, state, owner, epoch, lease_until, next_index, sealed, print_ = row
    try:
        body = json.loads(text)
        # Rows of older releases have neither a clip nor a tenant.
        clip = body.get("clip")
        return int(seq), SessionRecord(
            id=id_,
            model=body["model"],
            prompt=body["prompt"],
            seed=int(body["seed"]),
            pace=Pace(body["pace"]),
            on_idle=OnIdle(body["on_idle"]),
            labels=dict(body["labels"]),
            tenant=str(body.get("tenant", "")),
            clip=None if clip is None else ClipRef(**clip),
            created_at=float(created_at),
            state=SessionState(state),
            owner=owner,
            epoch=int(epoch),
            lease_until=float(lease_until),
            next_index=int(next_index),
            sealed=int(sealed),
            fingerprint=print_,
        )
    except (ValueError, TypeError, KeyError) as error:
        raise RowDamaged(f"session {id_!r} is unreadable: {error!r}") from error


def control_from(row: tuple[Any, ...]) -> LoggedControl:
    """The control entry in columns event_id, chunk, prompt, asked. Raises `RowDamaged`."""
    event_id, chunk, prompt, asked = row
    try:
        entry = ControlEntry(event_id=event_id, chunk=int(chunk), prompt=prompt)
        return LoggedControl(entry, None if asked is None else int(asked))
    except (ValueError, TypeError) as error:
        raise RowDamaged(f"control {event_id!r} is unreadable: {error!r}") from error


def snapshot_body(ref: SnapshotRef) -> str:
    """A reference as JSON, but for `pinned`, which has a column."""
    values = asdict(ref)
    del values["pinned"]
    return json.dumps(values)


def snapshot_from(row: tuple[Any, ...]) -> SnapshotRef:
    """The reference in columns body, pinned. Raises `RowDamaged`."""
    text, pinned = row
    try:
        return SnapshotRef(**json.loads(text), pinned=bool(pinned))
    except (ValueError, TypeError) as error:
        raise RowDamaged(f"a snapshot reference is unreadable: {error!r}") from error


def replica_body(record: ReplicaRecord) -> str:
    """A replica as JSON, but for `alive_until`, which has a column."""
    values = asdict(record)
    del values["alive_until"]
    return json.dumps(values)


def replica_from(row: tuple[Any, ...]) -> ReplicaRecord:
    """The replica in columns body, alive_until, whichever release wrote it. Raises `RowDamaged`."""
    text, alive_until = row
    try:
        values = {k: v for k, v in dict(json.loads(text)).items() if k in _REPLICA_FIELDS}
        values["sessions"] = tuple(values["sessions"])
        return ReplicaRecord(**values, alive_until=float(alive_until))
    except (ValueError, TypeError, KeyError) as error:
        raise RowDamaged(f"a replica is unreadable: {error!r}") from error
