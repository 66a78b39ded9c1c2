"""What each tenant has, on a Redis server: counted in one step by whoever creates a session.

Three sorted sets for a tenant hold session ids by the server's time at which they were named: of
open sessions, of open realtime ones, and of those created in the last minute, deleted or not. One
script looks at all three and names a new session only if none is full, so that however many
routers ask, no quota is overrun. A name comes before its session and goes after it; what a process
leaves behind that dies in between is found when a set is full, and only then are sessions read.
"""

from __future__ import annotations

from collections.abc import Iterator

from echo_ray.session.access import CREATE_WINDOW_S, Quota, Usage, check_quota
from echo_ray.session.records import Pace, SessionRecord, SessionState
from echo_ray.storage import redis_rows as rows
from echo_ray.storage.redis_change import SessionKeys
from echo_ray.storage.redis_link import Command, RedisLink, Script
from echo_ray.storage.redis_rows import Keys

# KEYS: sessions, realtime, creates. ARGV: id, now, from when creations count, what is kept of them
# in ms, 1 if realtime, 1 if created (and not brought back), the three quotas (-1: none).
TAKE = Script("""
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', ARGV[3])
local function full(key, quota) return quota >= 0 and redis.call('ZCARD', key) >= quota end
local free = not full(KEYS[1], tonumber(ARGV[7])) and not full(KEYS[3], tonumber(ARGV[9]))
if ARGV[5] == '1' then free = free and not full(KEYS[2], tonumber(ARGV[8])) end
local oldest = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
local counts = {free and 1 or 0, redis.call('ZCARD', KEYS[1]), redis.call('ZCARD', KEYS[2]),
  redis.call('ZCARD', KEYS[3]), oldest[2] or '0'}
if free then
  redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])
  if ARGV[5] == '1' then redis.call('ZADD', KEYS[2], ARGV[2], ARGV[1]) end
  if ARGV[6] == '1' then
    redis.call('ZADD', KEYS[3], ARGV[2], ARGV[1])
    redis.call('PEXPIRE', KEYS[3], ARGV[4])
  end
end
return counts
""")
_MAKING_S = 60.0
"""A name without a session is kept so long: its creator may still be at it."""
_SETS = ("sessions", "realtime", "creates")
_AT_ONCE = 200


class TenantSessions:
    """The sets of all tenants on one server. Times are the server's."""

    def __init__(self, link: RedisLink, keys: Keys, sessions: SessionKeys) -> None:
        self._link = link
        self._keys = keys
        self._sessions = sessions

    def take(self, record: SessionRecord, quota: Quota | None) -> None:
        """Name a session that is to be; None: whatever the tenant has. Raises `QuotaExceeded`."""
        if record.state is SessionState.CLOSED or (quota is None and not record.tenant):
            return
        free, usage, now = self._ask(record, quota)
        if not free and quota is not None:
            self._look(record.tenant, now)
            free, usage, now = self._ask(record, quota)
            if not free:
                check_quota(quota, usage, record, now)

    def forget(self, session_id: str, tenant: str) -> Iterator[Command]:
        """What takes the name of a session away that is closed or gone."""
        for what in ("sessions", "realtime"):
            yield ("ZREM", self._keys.tenant(tenant, what), session_id)

    def _ask(self, record: SessionRecord, quota: Quota | None) -> tuple[bool, Usage, float]:
        (time,) = self._link.run(("TIME",))
        now = rows.seconds(time)
        limits = (quota.sessions, quota.realtime, quota.creates) if quota else (None, None, None)
        (reply,) = self._link.run(
            TAKE.call(
                [self._keys.tenant(record.tenant, what) for what in _SETS],
                record.id,
                now,
                now - CREATE_WINDOW_S,
                int(CREATE_WINDOW_S * 1000),
                int(record.pace is Pace.REALTIME),
                int(quota is not None),
                *(-1 if limit is None else limit for limit in limits),
            )
        )
        free, sessions, realtime, creates, oldest = reply
        usage = Usage(
            sessions=int(sessions),
            realtime=int(realtime),
            creates=int(creates),
            oldest_create=float(oldest),
        )
        return bool(free), usage, now

    def _look(self, tenant: str, now: float) -> None:
        """Drop the names of sessions that are closed or gone."""
        key = self._keys.tenant(tenant, "sessions")
        (raw,) = self._link.run(("ZRANGEBYSCORE", key, "-inf", "+inf", "WITHSCORES"))
        named = list(zip(raw[::2], raw[1::2], strict=True))
        over: list[bytes] = []
        with self._sessions.undamaged():
            for at in range(0, len(named), _AT_ONCE):
                batch = named[at : at + _AT_ONCE]
                replies = self._link.run(*(self._sessions.read(id_.decode()) for id_, _ in batch))
                for (id_, named_at), reply in zip(batch, replies, strict=True):
                    stored = rows.stored_from(reply)
                    if stored is None:
                        gone = float(named_at) < now - _MAKING_S
                    else:
                        gone = stored.record.state is SessionState.CLOSED
                    if gone:
                        over.append(id_)
        if over:
            realtime = self._keys.tenant(tenant, "realtime")
            self._link.run(("ZREM", key, *over), ("ZREM", realtime, *over))
