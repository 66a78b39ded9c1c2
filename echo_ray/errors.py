"""Every error a user can meet, in one tree.

    EchoError                  internal               500  1011
    ├── ConfigError            config_invalid         400  1008   a key, a value or a file of ours
    │   ├── MemoryShort        memory_short           400  1008   the model does not fit
    │   ├── DeviceMissing      device_missing         400  1008   no CUDA device
    │   ├── DeviceTooOld       device_too_old         400  1008   for what is asked of it
    │   └── BackendMissing     backend_missing        400  1008   a library for this device
    ├── InvalidRequestError    invalid_request        400  1008   a field of a request
    │   ├── PromptError        prompt_invalid         400  1008
    │   ├── MessageError       message_invalid        400  1008   a socket message
    │   ├── MessageTooLarge    message_too_large      413  1009
    │   ├── ModelUnknown       model_unknown          400  1008
    │   ├── ClipInvalid        clip_invalid           400  1008   not a clip that can be read
    │   ├── ClipTooLarge       clip_too_large         413  1009   bytes, pictures or their size
    │   └── SegmentBeyondEnd   segment_beyond_end     400  1008   an index past the next one
    ├── Unauthenticated        unauthenticated        401  1008   no bearer token
    │   ├── TokenInvalid       token_invalid          401  1008   unknown, forged or malformed
    │   └── TokenExpired       token_expired          401  1008
    ├── Forbidden              forbidden              403  1008   a token without that right
    ├── NotFoundError          not_found              404  1008
    │   ├── SessionNotFound    session_not_found      404  1008
    │   ├── SnapshotNotFound   snapshot_not_found     404  1008
    │   └── ReplicaNotFound    replica_not_found      404  1008
    ├── ConflictError          conflict               409  1008
    │   ├── SessionExists      session_exists         409  1008
    │   ├── SessionClosed      session_closed         409  1008
    │   ├── EventIdConflict    event_id_conflict      409  1008   same id, another body
    │   ├── ChunkSealed        chunk_already_generated 409 1008   at_chunk lies in the past
    │   └── Fenced             fenced                 409  4001   a newer epoch owns the session
    ├── SegmentExpired         segment_expired        410  1008   older than the retention
    ├── ChunkUnreachable       chunk_unreachable      410  1008   no snapshot leads there any more
    ├── ClipLost               clip_lost              410  1008   a session's clip is gone
    ├── CapacityError          capacity_exhausted     429  1013   retry later
    │   ├── DeviceFull         device_full            429  1013   no memory for one more session
    │   ├── QuotaExceeded      quota_exceeded         429  1013   of the tenant
    │   └── ViewerTooSlow      viewer_too_slow        429  1013   fell behind the retention
    ├── UnavailableError       unavailable            503  1013
    │   ├── NoReplica          no_replica             503  1013
    │   ├── Draining           draining               503  1012
    │   └── StoreUnavailable   store_unavailable      503  1013
    │       ├── StoreFull      store_full             503  1013   disk full
    │       └── StoreCorrupt   store_corrupt          503  1011   a damaged database or file
    ├── SnapshotError          snapshot_invalid       400  1008
    │   ├── SnapshotTruncated  snapshot_truncated     400  1008
    │   ├── SnapshotCorrupt    snapshot_corrupt       400  1008   a checksum or a key does not fit
    │   ├── SnapshotForeign    snapshot_foreign       400  1008   not ours, or of another model
    │   └── SnapshotVersion    snapshot_version       400  1008   written by a newer release
    ├── ArchiveError           archive_invalid        400  1008   an exported session
    │   ├── ArchiveTruncated   archive_truncated      400  1008
    │   ├── ArchiveCorrupt     archive_corrupt        400  1008   checksum or part does not fit
    │   ├── ArchiveForeign     archive_foreign        400  1008   not ours
    │   ├── ArchiveVersion     archive_version        400  1008   written by a newer release
    │   └── ArchiveTooLarge    archive_too_large      413  1009
    ├── WeightsError           weights_invalid        500  1011   missing or misshapen tensors
    └── EngineError            engine_failed          500  1011

Columns: class, stable code, HTTP status, WebSocket close code. A message says what is wrong, the
value, the limit and the remedy.
"""

from __future__ import annotations

from typing import Any, ClassVar


class EchoError(Exception):
    """Something a user can act on; carries the HTTP and WebSocket answers with it."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    ws_close: ClassVar[int] = 1011
    retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def to_dict(self) -> dict[str, Any]:
        """The body of an error answer, the same over HTTP and on a socket."""
        return {
            "message": self.message,
            "type": type(self).__name__,
            "code": self.code,
            "param": self.param,
            "retryable": self.retryable,
            "retry_after_s": self.retry_after_s,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.param, self.retry_after_s)


def _rebuild(
    kind: type[EchoError], message: str, param: str | None, retry_after_s: float | None
) -> EchoError:
    return kind(message, param=param, retry_after_s=retry_after_s)


class ConfigError(EchoError):
    code, http_status, ws_close = "config_invalid", 400, 1008


class InvalidRequestError(EchoError):
    code, http_status, ws_close = "invalid_request", 400, 1008


class PromptError(InvalidRequestError):
    code = "prompt_invalid"


class MessageError(InvalidRequestError):
    code = "message_invalid"


class MessageTooLarge(InvalidRequestError):
    code, http_status, ws_close = "message_too_large", 413, 1009


class ModelUnknown(InvalidRequestError):
    code = "model_unknown"


class ClipInvalid(InvalidRequestError):
    code = "clip_invalid"


class ClipTooLarge(InvalidRequestError):
    code, http_status, ws_close = "clip_too_large", 413, 1009


class SegmentBeyondEnd(InvalidRequestError):
    code = "segment_beyond_end"


class Unauthenticated(EchoError):
    code, http_status, ws_close = "unauthenticated", 401, 1008


class TokenInvalid(Unauthenticated):
    code = "token_invalid"


class TokenExpired(Unauthenticated):
    code = "token_expired"


class Forbidden(EchoError):
    code, http_status, ws_close = "forbidden", 403, 1008


class NotFoundError(EchoError):
    code, http_status, ws_close = "not_found", 404, 1008


class SessionNotFound(NotFoundError):
    code = "session_not_found"


class SnapshotNotFound(NotFoundError):
    code = "snapshot_not_found"


class ReplicaNotFound(NotFoundError):
    code = "replica_not_found"


class ConflictError(EchoError):
    code, http_status, ws_close = "conflict", 409, 1008


class SessionExists(ConflictError):
    code = "session_exists"


class SessionClosed(ConflictError):
    code = "session_closed"


class EventIdConflict(ConflictError):
    code = "event_id_conflict"


class ChunkSealed(ConflictError):
    code = "chunk_already_generated"


class Fenced(ConflictError):
    """A newer epoch owns the session; whoever gets this stops writing at once."""

    code, ws_close = "fenced", 4001


class SegmentExpired(EchoError):
    code, http_status, ws_close = "segment_expired", 410, 1008


class ChunkUnreachable(EchoError):
    """Neither a snapshot nor the start of the session is near enough to make this chunk again."""

    code, http_status, ws_close = "chunk_unreachable", 410, 1008


class ClipLost(EchoError):
    """What a session begins with cannot be read any more, and no snapshot leads past it."""

    code, http_status, ws_close = "clip_lost", 410, 1008


class CapacityError(EchoError):
    code, http_status, ws_close, retryable = "capacity_exhausted", 429, 1013, True


class DeviceFull(CapacityError):
    code = "device_full"


class QuotaExceeded(CapacityError):
    """What the tenant may have is used up."""

    code = "quota_exceeded"


class ViewerTooSlow(CapacityError):
    code = "viewer_too_slow"


class UnavailableError(EchoError):
    code, http_status, ws_close, retryable = "unavailable", 503, 1013, True


class NoReplica(UnavailableError):
    code = "no_replica"


class Draining(UnavailableError):
    code, ws_close = "draining", 1012


class StoreUnavailable(UnavailableError):
    code = "store_unavailable"


class StoreFull(StoreUnavailable):
    code = "store_full"


class StoreCorrupt(StoreUnavailable):
    code, ws_close, retryable = "store_corrupt", 1011, False


class SnapshotError(EchoError):
    code, http_status, ws_close = "snapshot_invalid", 400, 1008


class SnapshotTruncated(SnapshotError):
    code = "snapshot_truncated"


class SnapshotCorrupt(SnapshotError):
    code = "snapshot_corrupt"


class SnapshotForeign(SnapshotError):
    code = "snapshot_foreign"


class SnapshotVersion(SnapshotError):
    code = "snapshot_version"


class ArchiveError(EchoError):
    code, http_status, ws_close = "archive_invalid", 400, 1008


class ArchiveTruncated(ArchiveError):
    code = "archive_truncated"


class ArchiveCorrupt(ArchiveError):
    code = "archive_corrupt"


class ArchiveForeign(ArchiveError):
    code = "archive_foreign"


class ArchiveVersion(ArchiveError):
    code = "archive_version"


class ArchiveTooLarge(ArchiveError):
    code, http_status, ws_close = "archive_too_large", 413, 1009


class MemoryShort(ConfigError):
    code = "memory_short"


class DeviceMissing(ConfigError):
    code = "device_missing"


class DeviceTooOld(ConfigError):
    code = "device_too_old"


class BackendMissing(ConfigError):
    code = "backend_missing"


class WeightsError(EchoError):
    code = "weights_invalid"


class EngineError(EchoError):
    code = "engine_failed"
