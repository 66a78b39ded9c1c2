"""How sessions, control entries, snapshot references and replicas lie in Redis keys.

    {prefix}:s:{id}:session    hash: a session's fields as JSON, `version`, and counters
    {prefix}:s:{id}:log        sorted set by chunk: position and entry
    {prefix}:s:{id}:events     hash: event id -> chunk
    {prefix}:s:{id}:commits    hash: chunk -> digest
    {prefix}:s:{id}:snapshots  hash: snapshot id -> reference
    {prefix}:s:{id}:blobs      hash: blob id -> which pieces (redis_snapshots.py)
    {prefix}:s:{id}:piece:...  a piece of a blob
    {prefix}:sessions          set: ids of all sessions, and perhaps of some that are not there
    {prefix}:open              sorted set: ids of open sessions by when to look (redis_open.py)
    {prefix}:t:{tenant}:WHAT   sorted set: ids of a tenant's sessions by when (redis_quota.py)
    {prefix}:blobs             set: ids of all sessions with blobs, and perhaps of others
    {prefix}:identity          set while nothing was lost (redis_identity.py)
    {prefix}:created           how many sessions were created
    {prefix}:waited            how often something was waited for that was written before
    {prefix}:r:{live}:until    sorted set: replica id by the time until which it is alive
    {prefix}:r:{live}:draining set: ids of replicas that drain, and perhaps of some that are gone
    {prefix}:r:{live}:at:ID    a replica, with an expiry

Times until which something holds are of the server's clock.

The braces round a session's id are part of the key: all keys of a session have one hash slot.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from echo_ray.session.control_log import LoggedControl, check_text
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

R = TypeVar("R", SnapshotRef, ReplicaRecord)
_SESSION_FIELDS = tuple(f.name for f in fields(SessionRecord))


class Damaged(ValueError):
    """What was read cannot have been written by this release."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A session with what its key holds beside the record."""

    record: SessionRecord
    version: str
    """Changes with every change of the session, but for renewals of its lease."""
    seq: int
    """How many sessions were created before it; their order where `created_at` is equal."""
    appended: int
    """Entries in the log."""
    recorded: int
    """Snapshots recorded, ever."""


class Keys:
    """The names of all keys under a prefix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.sessions = f"{prefix}:sessions"
        self.open = f"{prefix}:open"
        self.blobs = f"{prefix}:blobs"
        self.created = f"{prefix}:created"
        self.waited = f"{prefix}:waited"
        self.alive = f"{prefix}:r:{{live}}:until"
        self.draining = f"{prefix}:r:{{live}}:draining"

    def of(self, session_id: str, what: str) -> str:
        """A key of one session. Raises `InvalidRequestError` for an id without a UTF-8 form."""
        check_text("session_id", session_id)
        return f"{self._prefix}:s:{{{session_id}}}:{what}"

    def tenant(self, tenant: str, what: str) -> str:
        """A key of one tenant."""
        return f"{self._prefix}:t:{{{tenant}}}:{what}"

    def replica(self, replica_id: str) -> str:
        check_text("replica_id", replica_id)
        return f"{self._prefix}:r:{{live}}:at:{replica_id}"


def seconds(time: list[bytes]) -> float:
    """The server's wall time in the reply to TIME."""
    whole, micros = time
    return int(whole) + int(micros) / 1e6


def as_text(value: object) -> str:
    """A field's value as it lies in a session's hash; equal values are equal texts."""
    return json.dumps(value)


def session_fields(record: SessionRecord) -> dict[str, str]:
    """Every field of a record as JSON."""
    values = {name: getattr(record, name) for name in _SESSION_FIELDS}
    values["labels"] = dict(record.labels)
    values["clip"] = None if record.clip is None else asdict(record.clip)
    return {name: as_text(value) for name, value in values.items()}


def changed_fields(before: SessionRecord, after: SessionRecord) -> dict[str, str]:
    """Those fields of `after` that are others than before."""
    old = session_fields(before)
    return {name: text for name, text in session_fields(after).items() if text != old[name]}


def stored_from(reply: list[bytes]) -> Stored | None:
    """The session in the reply to HGETALL, None if there is none. Raises `Damaged`."""
    if not reply:
        return None
    raw = dict(zip(reply[::2], reply[1::2], strict=True))
    try:
        # Sessions of releases without tenants have no such field.
        raw.setdefault(b"tenant", b'""')
        held = {name: json.loads(raw[name.encode()]) for name in _SESSION_FIELDS}
        held["pace"], held["on_idle"] = Pace(held["pace"]), OnIdle(held["on_idle"])
        held["state"] = SessionState(held["state"])
        held["clip"] = None if held["clip"] is None else ClipRef(**held["clip"])
        for name in ("epoch", "next_index", "sealed", "seed"):
            held[name] = int(held[name])
        for name in ("created_at", "lease_until"):
            held[name] = float(held[name])
        counters = (int(raw[name]) for name in (b"seq", b"appended", b"recorded"))
        return Stored(SessionRecord(**held), raw[b"version"].decode(), *counters)
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged(f"a session is unreadable: {error!r}") from error


def tenant_from(text: bytes | None) -> str:
    """The tenant in a session's field; none if that is missing or unreadable."""
    try:
        tenant = json.loads(text or b'""')
    except ValueError:
        return ""
    return tenant if isinstance(tenant, str) else ""


def entry_member(position: int, logged: LoggedControl) -> str:
    """An entry as a member of the log; members of one chunk sort by position."""
    entry = logged.entry
    return f"{position:016d}{json.dumps([entry.event_id, entry.chunk, entry.prompt, logged.asked])}"


def entry_from(member: bytes) -> LoggedControl:
    """The entry in a member of the log. Raises `Damaged`."""
    try:
        event_id, chunk, prompt, asked = json.loads(member[16:])
        entry = ControlEntry(event_id=event_id, chunk=int(chunk), prompt=prompt)
        return LoggedControl(entry, None if asked is None else int(asked))
    except (ValueError, TypeError) as error:
        raise Damaged(f"a control entry is unreadable: {error!r}") from error


def snapshot_text(ref: SnapshotRef, position: int) -> str:
    """A reference as JSON, with its place in the order of recording."""
    return json.dumps({"position": position, **asdict(ref)})


def snapshot_from(text: bytes) -> tuple[int, SnapshotRef]:
    """Place and reference. Raises `Damaged`."""
    try:
        values = json.loads(text)
        return int(values["position"]), _known(SnapshotRef, values)
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged(f"a snapshot reference is unreadable: {error!r}") from error


def replica_text(record: ReplicaRecord) -> str:
    return json.dumps(asdict(record))


def replica_from(text: bytes) -> ReplicaRecord:
    """Raises `Damaged`."""
    try:
        values = json.loads(text)
        values["sessions"] = tuple(values["sessions"])
        return _known(ReplicaRecord, values)
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged(f"a replica is unreadable: {error!r}") from error


def _known(kind: type[R], values: Mapping[str, Any]) -> R:
    """A record of the fields this release knows: a newer one beside it may write more."""
    return kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})
