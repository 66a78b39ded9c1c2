"""Which sessions are open, and which of them nobody looks after: the index of a Redis directory.

One sorted set holds the id of every session that is not closed, by the server's time from which
somebody should look whether it still has an owner. A session's own keys decide; the set is a hint
that may name too much and never too little:

* It is not in the session's hash slot, so it is not written in the session's script: a name comes
  before its session and goes after it, and a change of owner or state is followed by a new time.
* Renewals leave it alone. Who looks and finds a lease running sets the time to its end, so each
  session is looked at about once a lease by all routers together, and never because it was renewed.
* A process that dies between a change and the new time leaves an older one, which is at most
  `LOOK_S` ahead. What is looked at and was closed or is gone loses its name there and then.
* Names that are missing all the same (an older release made the session) are added by whoever
  lists all sessions.
"""

from __future__ import annotations

from collections.abc import Sequence

from echo_ray.session.control_log import goes_on, orphaned
from echo_ray.session.records import SessionRecord, SessionState
from echo_ray.storage import redis_rows as rows
from echo_ray.storage.redis_change import SessionKeys
from echo_ray.storage.redis_link import Command, RedisLink, Script
from echo_ray.storage.redis_quota import TenantSessions
from echo_ray.storage.redis_rows import Keys, Stored

LOOK_S = 60.0
"""A session that needs no owner is looked at as seldom as this, and a name without a session is
kept as long: its creator may still be at it."""
_AT_ONCE = 200

# ARGV: id, the time that was read, the new one or nothing, for each. Another time than the one
# that was read means that the session changed since.
MOVE = Script("""#!lua flags=allow-oom
for i = 1, #ARGV, 3 do
  if redis.call('ZSCORE', KEYS[1], ARGV[i]) == ARGV[i + 1] then
    if ARGV[i + 2] == '' then redis.call('ZREM', KEYS[1], ARGV[i])
    else redis.call('ZADD', KEYS[1], ARGV[i + 2], ARGV[i]) end
  end
end
return 1
""")


class OpenSessions:
    """The index on one server. Times are the server's."""

    def __init__(
        self, link: RedisLink, keys: Keys, sessions: SessionKeys, tenants: TenantSessions
    ) -> None:
        self._link = link
        self._key = keys.open
        self._sessions = sessions
        self._tenants = tenants

    def name(self, session_id: str, now: float) -> Command:
        """What names a session; sent before it is there."""
        return ("ZADD", self._key, now, session_id)

    def forget(self, session_id: str, tenant: str) -> list[Command]:
        """What takes the names of a session away that is closed or gone."""
        return [("ZREM", self._key, session_id), *self._tenants.forget(session_id, tenant)]

    def follow(self, record: SessionRecord, now: float) -> None:
        """Note that the session has got, or lost, its owner."""
        if record.state is SessionState.CLOSED:
            self._link.run(*self.forget(record.id, record.tenant))
        elif goes_on(record):
            self._link.run(("ZADD", self._key, max(now, record.lease_until), record.id))

    def count(self) -> int:
        """How many are open, a few that were closed or deleted a moment ago perhaps included."""
        (count,) = self._link.run(("ZCARD", self._key))
        return int(count)

    def names(self) -> Command:
        return ("ZRANGEBYSCORE", self._key, "-inf", "+inf")

    def add(self, records: Sequence[SessionRecord], now: float) -> None:
        """Name those that have no name yet."""
        for at in range(0, len(records), _AT_ONCE):
            pairs = [part for r in records[at : at + _AT_ONCE] for part in (now, r.id)]
            self._link.run(("ZADD", self._key, "NX", *pairs))

    def orphans(self) -> tuple[list[Stored], float]:
        """Sessions that wait for an owner and the time of looking; O(those that were due)."""
        (time,) = self._link.run(("TIME",))
        now = rows.seconds(time)
        (raw,) = self._link.run(("ZRANGEBYSCORE", self._key, "-inf", now, "WITHSCORES"))
        due = list(zip(raw[::2], raw[1::2], strict=True))
        found: list[Stored] = []
        for at in range(0, len(due), _AT_ONCE):
            found += self._look(due[at : at + _AT_ONCE], now)
        return found, now

    def _look(self, due: Sequence[tuple[bytes, bytes]], now: float) -> list[Stored]:
        found: list[Stored] = []
        moves: list[bytes | float | str] = []
        with self._sessions.undamaged():
            replies = self._link.run(*(self._sessions.read(id_.decode()) for id_, _ in due))
            for (id_, seen), reply in zip(due, replies, strict=True):
                stored = rows.stored_from(reply)
                if stored is None:
                    if float(seen) < now - LOOK_S:
                        moves += (id_, seen, "")
                elif stored.record.state is SessionState.CLOSED:
                    moves += (id_, seen, "")
                elif orphaned(stored.record, now):
                    found.append(stored)
                else:
                    later = stored.record.lease_until if goes_on(stored.record) else now + LOOK_S
                    moves += (id_, seen, later)
        if moves:
            self._link.run(MOVE.call([self._key], *moves))
        return found
