"""The client's side of the wire: every socket message as a value, read strictly, written once.

A message is one JSON object told apart by `type`. A type that this release does not know is
ignored (`None`); a known type with a wrong shape raises `MessageError`. What a client sends may
hold no unknown field, since a mistyped one would be lost in silence; what a server sends may, so
that an older client reads a newer server. Knows nothing about sockets or sessions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar

from echo_ray.errors import EchoError, MessageError, MessageTooLarge, UnavailableError

MAX_INDEX = 2**53 - 1
"""The largest whole number that every JSON reader keeps exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One socket message; subclasses are its types."""

    type: ClassVar[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attach(Message):
    """Go on from another index; without one, from the live edge."""

    type = "session.attach"
    start: int | None = field(default=None, metadata={"json": "from"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What a viewer asks of a session."""

    prompt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Interaction(Message):
    type = "session.interaction"
    event_id: str
    event: Event
    at_chunk: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack(Message):
    """The viewer has consumed this chunk: its reading speed, told and not guessed."""

    type = "session.ack"
    chunk_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause(Message):
    type = "session.pause"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume(Message):
    type = "session.resume"


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeSnapshot(Message):
    type = "session.snapshot"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping(Message):
    type = "session.ping"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop(Message):
    """End the session for everybody."""

    type = "session.stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Created(Message):
    """The session as `GET /v1/sessions/{id}` shows it; the first message on every socket."""

    type = "session.created"
    session: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoStart(Message):
    """How the segments that follow are to be read; `start` is the first index to come."""

    type = "video.start"
    format: str
    fps: int
    width: int
    height: int
    mime: str
    start: int = field(default=0, metadata={"json": "from"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkMetadata(Message):
    """Announces exactly one binary message of `byte_length` bytes."""

    type = "video.chunk_metadata"
    chunk_index: int
    num_frames: int
    pts_ms: float
    byte_length: int
    digest: str
    epoch: int
    prompt: str = ""
    ignored_words: tuple[str, ...] = ()
    """Words of `prompt` that the model did not understand; owners of older releases say none."""
    started_event_ids: tuple[str, ...] = ()
    active_event_ids: tuple[str, ...] = ()
    completed_event_ids: tuple[str, ...] = ()
    discontinuity: bool = False
    drift: Mapping[str, Any] | None = None
    owner: str = ""
    chunk_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InteractionQueued(Message):
    """The event is durable and takes effect at this chunk."""

    type = "session.interaction.queued"
    event_id: str
    effective_chunk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotCommitted(Message):
    type = "session.snapshot.committed"
    snapshot: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Migrating(Message):
    type = "session.migrating"
    to: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Migrated(Message):
    type = "session.migrated"
    owner: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused(Message):
    """No more segments until somebody resumes the session; the socket stays open."""

    type = "session.paused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(Message):
    type = "session.resumed"


@dataclass(frozen=True, slots=True, kw_only=True)
class GoingAway(Message):
    """This router is about to stop: connect again with the next index."""

    type = "session.going_away"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done(Message):
    """The session has ended; the socket closes with 1000. `reason`: closed, deleted or rewound."""

    type = "session.done"
    reason: str = "closed"
    successor: str | None = None
    """The session that took its place, if it was rewound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong(Message):
    type = "pong"


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorMessage(Message):
    """An `EchoError` on a socket. The socket stays open unless a close follows."""

    type = "error"
    code: str
    message: str
    retryable: bool = False
    param: str | None = None
    retry_after_s: float | None = None
    event_id: str | None = None
    """The interaction that was refused, if it was one."""


_CLIENT_TYPES: dict[str, type[Message]] = {
    kind.type: kind for kind in (Attach, Interaction, Ack, Pause, Resume, TakeSnapshot, Ping, Stop)
}
_CLIENT_TYPES["ping"] = Ping
_SERVER_TYPES: dict[str, type[Message]] = {
    kind.type: kind
    for kind in (
        Created,
        VideoStart,
        ChunkMetadata,
        InteractionQueued,
        SnapshotCommitted,
        Migrating,
        Migrated,
        Paused,
        Resumed,
        GoingAway,
        Done,
        Pong,
        ErrorMessage,
    )
}


def parse_client(data: str | bytes, *, limit_bytes: int) -> Message | None:
    """Read what a viewer sent; `None` for an unknown type.

    Raises `MessageTooLarge` over the limit and `MessageError` on anything malformed.
    """
    if isinstance(data, bytes):
        raise MessageError(
            f"a binary message of {len(data)} bytes: viewers send JSON text messages only"
        )
    size = len(data) if len(data) > limit_bytes else len(data.encode("utf-8", "surrogatepass"))
    if size > limit_bytes:
        raise MessageTooLarge(
            f"a message of {size} bytes; at most {limit_bytes} are read: send a shorter one"
        )
    body = parse_object(data)
    kind = _CLIENT_TYPES.get(_type_of(body))
    return None if kind is None else _build(kind, body, strict=True)


def parse_server(data: str) -> Message | None:
    """Read what a server sent; `None` for an unknown type. Raises `MessageError`."""
    body = parse_object(data)
    kind = _SERVER_TYPES.get(_type_of(body))
    return None if kind is None else _build(kind, body, strict=False)


def encode(message: Message) -> str:
    """The text of a message; fields that are `None` are left out."""
    body: dict[str, Any] = {"type": message.type}
    for f, name in _named(type(message)):
        value = getattr(message, f.name)
        if isinstance(value, Event):
            value = {"prompt": value.prompt}
        if value is not None:
            body[name] = value
    return json.dumps(body, separators=(",", ":"), allow_nan=False)


def error_message(error: EchoError, *, event_id: str | None = None) -> ErrorMessage:
    """An error as a socket message."""
    return ErrorMessage(
        code=error.code,
        message=error.message,
        retryable=error.retryable,
        param=error.param,
        retry_after_s=error.retry_after_s,
        event_id=event_id,
    )


def error_from(body: Mapping[str, Any]) -> EchoError:
    """The `EchoError` that an error body (HTTP or socket) stands for, by its stable code."""
    code, message = str(body.get("code", "")), str(body.get("message", "no message"))
    param, retry = body.get("param"), body.get("retry_after_s")
    kind = _by_code(EchoError, code)
    if kind is None:
        kind = UnavailableError if body.get("retryable") is True else EchoError
        message = f"{code}: {message}"
    return kind(
        message,
        param=param if isinstance(param, str) else None,
        retry_after_s=float(retry) if isinstance(retry, int | float) else None,
    )


def parse_object(data: str) -> dict[str, Any]:
    """Read one JSON object: no duplicate keys, no NaN. Raises `MessageError`."""
    try:
        body = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise MessageError(f"not JSON: {_short(e)}; send one JSON object per message") from e
    if not isinstance(body, dict):
        raise MessageError(f"expected a JSON object, got {type(body).__name__}")
    return body


def _type_of(body: Mapping[str, Any]) -> str:
    kind = body.get("type")
    if not isinstance(kind, str):
        raise MessageError(f"type: {_short(kind)} is not a string; name the type", param="type")
    return kind


def _build(kind: type[Message], body: Mapping[str, Any], *, strict: bool) -> Message:
    values: dict[str, Any] = {}
    names = {"type"}
    for f, name in _named(kind):
        names.add(name)
        value = body.get(name)
        if value is None:
            if f.default is MISSING:
                raise MessageError(f"{kind.type}: {name} is missing", param=name)
            values[f.name] = f.default
            continue
        check, expected = _CHECKS[str(f.type).removesuffix(" | None")]
        read = check(value)
        if read is None:
            raise MessageError(
                f"{kind.type}: {name}: {_short(value)} is not {expected}", param=name
            )
        values[f.name] = read
    surplus = sorted(set(body) - names) if strict else []
    if surplus:
        raise MessageError(
            f"{kind.type}: {_short(surplus[0])} is unknown; known: {', '.join(sorted(names))}",
            param=surplus[0],
        )
    return kind(**values)


def _named(kind: type[Message]) -> Iterator[tuple[Field[Any], str]]:
    for f in fields(kind):
        yield f, f.metadata.get("json", f.name)


def _index(value: object) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value <= MAX_INDEX else None  # type: ignore[operator,return-value]


def _number(value: object) -> float | None:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return value if real and abs(value) <= MAX_INDEX else None  # type: ignore[arg-type,return-value]


def _texts(value: object) -> tuple[str, ...] | None:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        return None
    return tuple(value)


def _event(value: object) -> Event | None:
    if not isinstance(value, dict) or set(value) != {"prompt"}:
        return None
    return Event(prompt=value["prompt"]) if isinstance(value["prompt"], str) else None


_CHECKS: dict[str, tuple[Callable[[object], Any], str]] = {
    "str": (lambda v: v if isinstance(v, str) else None, "a string"),
    "bool": (lambda v: v if isinstance(v, bool) else None, "true or false"),
    "int": (_index, f"a whole number from 0 to {MAX_INDEX}"),
    "float": (_number, "a number"),
    "tuple[str, ...]": (_texts, "a list of strings"),
    "Mapping[str, Any]": (lambda v: v if isinstance(v, dict) else None, "an object"),
    "Event": (_event, 'an object {"prompt": string}'),
}


def _by_code(kind: type[EchoError], code: str) -> type[EchoError] | None:
    if kind.code == code:
        return kind
    return next((k for sub in kind.__subclasses__() if (k := _by_code(sub, code))), None)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise ValueError("an object names a key twice")
    return body


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _short(value: object) -> str:
    text = str(value) if isinstance(value, Exception) else ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
