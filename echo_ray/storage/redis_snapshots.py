"""Snapshot blobs on a Redis server, in pieces, so that no other command waits for a whole blob.

Pieces are written with an expiry, under a name of their own for every `put`. Then one script makes
them permanent and enters them under the blob's id: a writer that dies before leaves nothing that
stays. They are in the server's log before the directory's reference to the blob is, so whenever
that is durable they are too.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from echo_ray.errors import StoreUnavailable
from echo_ray.session import control_log
from echo_ray.session.sweep import StoredBlob
from echo_ray.storage.blob_names import check_ids, check_size
from echo_ray.storage.one_tier import OneTier
from echo_ray.storage.redis_link import RedisLink, RedisServer, Script
from echo_ray.storage.redis_rows import Keys

PIECE_BYTES = 2**20
PIECE_KEPT_S = 600
"""A blob must be written within this time."""
_READ_AGAIN = 32

_ENTER = Script("""
for i = 2, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 0 then return 0 end
end
local before = redis.call('HGET', KEYS[1], ARGV[1]) or ''
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
for i = 2, #KEYS do redis.call('PERSIST', KEYS[i]) end
return before
""")
_FORGET = Script("""
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
return 1
""")
_UNLIST = Script("""
if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('SREM', KEYS[2], ARGV[1]) end
return 1
""")


@dataclass(frozen=True, slots=True)
class _Blob:
    """An entry of a session's table: which pieces a blob has."""

    name: str
    size: int
    at: float
    """Server's wall time when writing began."""


class RedisSnapshots(OneTier):
    """A `SweptStore` on `server`, under keys that begin with `prefix`."""

    name = "redis"

    def __init__(
        self, server: RedisServer, *, prefix: str = "echo", limit_bytes: int = 2**30
    ) -> None:
        self._keys = Keys(prefix)
        self._limit_bytes = limit_bytes
        self._link = RedisLink(server, (_ENTER, _FORGET, _UNLIST))

    def close(self) -> None:
        self._link.close()

    def put(self, session_id: str, snapshot_id: str, blob: bytes) -> None:
        check_ids(session_id, snapshot_id)
        check_size(snapshot_id, len(blob), self._limit_bytes)
        listed = ("SADD", self._keys.blobs, session_id)
        _, (seconds, micros) = self._link.run(listed, ("TIME",))
        made = _Blob(secrets.token_hex(8), len(blob), int(seconds) + int(micros) / 1e6)
        pieces = self._pieces(session_id, made)
        view = memoryview(blob)
        for n, key in enumerate(pieces):
            part = bytes(view[n * PIECE_BYTES : (n + 1) * PIECE_BYTES])
            self._link.run(("SET", key, part, "EX", PIECE_KEPT_S))
        text = json.dumps(asdict(made))
        enter = _ENTER.call([self._table(session_id), *pieces], snapshot_id, text)
        before, _ = self._link.run(enter, listed)
        if before == 0:
            raise StoreUnavailable(
                f"{self._link.address}: snapshot {snapshot_id!r} took more than {PIECE_KEPT_S} s "
                "to write; see to the server, then try again"
            )
        # The script's own text, if its first answer was lost and it was sent twice.
        if before and self._parsed(before) != made:
            self._unlink(self._pieces(session_id, self._parsed(before)))

    def get(self, session_id: str, snapshot_id: str) -> bytes:
        check_ids(session_id, snapshot_id)
        seen: bytes | None = None
        for _ in range(_READ_AGAIN):
            (text,) = self._link.run(("HGET", self._table(session_id), snapshot_id))
            if text is None:
                raise control_log.snapshot_not_found(session_id, snapshot_id)
            made = self._parsed(text)
            parts = [self._link.run(("GET", key))[0] for key in self._pieces(session_id, made)]
            found = [part for part in parts if part is not None]
            if len(found) == len(parts) and sum(map(len, found)) == made.size:
                return b"".join(found)
            if text == seen:
                raise self._link.damaged(f"snapshot {snapshot_id!r} of {session_id!r} lacks bytes")
            # Replaced or deleted meanwhile; the second look tells.
            seen = text
        raise StoreUnavailable(
            f"{self._link.address}: snapshot {snapshot_id!r} of {session_id!r} was replaced "
            f"{_READ_AGAIN} times while it was read; try again"
        )

    def delete(self, session_id: str, snapshot_id: str) -> None:
        check_ids(session_id, snapshot_id)
        (text,) = self._link.run(("HGET", self._table(session_id), snapshot_id))
        if text is not None:
            self._forget(session_id, snapshot_id, text)

    def delete_session(self, session_id: str) -> None:
        check_ids(session_id)
        (table,) = self._link.run(("HGETALL", self._table(session_id)))
        for id_, text in zip(table[::2], table[1::2], strict=True):
            self._forget(session_id, id_, text)
        self._link.run(_UNLIST.call([self._table(session_id), self._keys.blobs], session_id))

    def list_blobs(self, session_id: str | None = None) -> Iterator[StoredBlob]:
        if session_id is None:
            (names,) = self._link.run(("SMEMBERS", self._keys.blobs))
            sessions = [name.decode(errors="replace") for name in names]
        else:
            check_ids(session_id)
            sessions = [session_id]
        for session in sessions:
            (table,) = self._link.run(("HGETALL", self._table(session)))
            for id_, text in zip(table[::2], table[1::2], strict=True):
                made = self._parsed(text)
                yield StoredBlob(
                    session_id=session,
                    snapshot_id=id_.decode(errors="replace"),
                    size_bytes=made.size,
                    stored_at=made.at,
                )

    def _forget(self, session_id: str, snapshot_id: str | bytes, text: bytes) -> None:
        """Forget a blob unless it was replaced since, and free its pieces."""
        (done,) = self._link.run(_FORGET.call([self._table(session_id)], snapshot_id, text))
        if done:
            self._unlink(self._pieces(session_id, self._parsed(text)))

    def _table(self, session_id: str) -> str:
        return self._keys.of(session_id, "blobs")

    def _pieces(self, session_id: str, made: _Blob) -> list[str]:
        count = -(-made.size // PIECE_BYTES)
        return [self._keys.of(session_id, f"piece:{made.name}:{n}") for n in range(count)]

    def _unlink(self, keys: list[str]) -> None:
        if keys:
            self._link.run(("UNLINK", *keys))

    def _parsed(self, text: bytes) -> _Blob:
        try:
            made = json.loads(text)
            return _Blob(str(made["name"]), int(made["size"]), float(made["at"]))
        except (ValueError, TypeError, KeyError) as error:
            raise self._link.damaged(f"a table of blobs is unreadable ({error!r})") from error
