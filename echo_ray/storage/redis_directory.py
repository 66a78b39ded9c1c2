"""The session directory on a Redis server, for any number of machines.

The rules are the functions of `session/control_log.py`, applied here and not in the server. A
change reads the session, decides, and writes through one script: if the session's version is still
the one that was read, make these writes and set a new version; else read again. Two round trips.
Every attempt of one change carries the same new version, so that a change whose answer was lost is
recognised when the session is read again.

Renewals go past this: they set `lease_until` if epoch and owner are the lease's, many in one round
trip, and leave the version alone. They and the deletion of things need no free memory.

Deadlines are of the server's clock: whoever sets one asks for the server's time before, and who
reads one asks for the time with it and translates. So no two machines' clocks have to agree.

What is durable when, and why: `redis_durability.py`. The set of all sessions is only a hint. It
names a session before the session is there and until after it is gone, so a crash in between
leaves a name without a session, which `list` leaves out, and never a session without a name.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from echo_ray.clock import Clock
from echo_ray.session import control_log
from echo_ray.session.access import Quota
from echo_ray.session.control_log import DIGESTS_KEPT, LoggedControl
from echo_ray.session.forking import Past, check_past
from echo_ray.session.placement import check_among
from echo_ray.session.records import (
    ControlEntry,
    Lease,
    ReplicaRecord,
    SessionRecord,
    SessionState,
    SnapshotRef,
)
from echo_ray.storage import redis_rows as rows
from echo_ray.storage.redis_change import (
    COMMITS,
    DONE,
    EVENTS,
    LOG,
    SESSION,
    SET_IF_SAME,
    SNAPSHOTS,
    Change,
    SessionKeys,
    flat,
    past_writes,
)
from echo_ray.storage.redis_durability import check_safe, check_server, waits_for
from echo_ray.storage.redis_link import Command, RedisLink, RedisServer, Script
from echo_ray.storage.redis_open import MOVE, OpenSessions
from echo_ray.storage.redis_quota import TAKE, TenantSessions
from echo_ray.storage.redis_rows import Damaged, Keys, Stored

_RENEW = Script("""#!lua flags=allow-oom
local held = redis.call('HMGET', KEYS[1], 'owner', 'epoch')
if held[1] ~= ARGV[1] or held[2] ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'lease_until', ARGV[3])
return 1
""")
_TIME: Command = ("TIME",)
_LISTED_AT_ONCE = 200
_REPLICA_KEPT_S = 60.0
"""How much longer than its time the server remembers a replica."""
_At = tuple[SessionRecord, float]
"""A session, with deadlines of the server's, and the server's time of its change."""


class RedisDirectory:
    """A `Directory` on `server`, under keys that begin with `prefix`.

    Opening raises `ConfigError` for a server that cannot keep what `durability` promises. When a
    call raises `StoreUnavailable` because the server did not answer, the change may have been made.
    """

    def __init__(
        self,
        server: RedisServer,
        clock: Clock,
        *,
        prefix: str = "echo",
        durability: str = "always",
        replicas: int = 0,
    ) -> None:
        self._clock = clock
        self._keys = Keys(prefix)
        self._wait = waits_for(durability, replicas)
        self._link = RedisLink(server, (SET_IF_SAME, _RENEW, MOVE, TAKE))
        self._sessions = SessionKeys(self._link, self._keys, self._wait)
        self._tenants = TenantSessions(self._link, self._keys, self._sessions)
        self._open = OpenSessions(self._link, self._keys, self._sessions, self._tenants)
        try:
            check_server(self._link, durability)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._link.close()

    def create(self, record: SessionRecord, *, quota: Quota | None = None) -> None:
        self.restore(Past(record=record), quota=quota)

    def restore(self, past: Past, *, quota: Quota | None = None) -> None:
        check_past(past)
        record = past.record
        self._tenants.take(record, quota)
        keys = self._sessions.all_of(record.id)
        named: Command = ("SADD", self._keys.sessions, record.id)
        _, seq, time = self._link.run(named, ("INCR", self._keys.created), _TIME)
        self._link.run(self._open.name(record.id, rows.seconds(time)))
        version = secrets.token_hex(8)
        counts = {"seq": seq, "appended": len(past.controls), "recorded": len(past.snapshots)}
        fields = rows.session_fields(record) | {name: str(n) for name, n in counts.items()}
        writes = [("HSET", SESSION, *flat(fields)), *past_writes(past)]
        if self._sessions.write(keys, "", version, writes, told=True) != DONE:
            (held,) = self._link.run(("HGET", keys[0], "version"))
            if held != version.encode():
                raise control_log.exists(record.id)
            self._sessions.settle(told=True)

    def get(self, session_id: str) -> SessionRecord:
        reply, time = self._link.run(self._sessions.read(session_id), _TIME)
        return self._here(self._sessions.found(session_id, reply).record, rows.seconds(time))

    def list(self) -> Sequence[SessionRecord]:
        raw, names, time = self._link.run(
            ("SMEMBERS", self._keys.sessions), self._open.names(), _TIME
        )
        found: list[Stored] = []
        with self._sessions.undamaged():
            ids = [id_.decode() for id_ in raw]
            for at in range(0, len(ids), _LISTED_AT_ONCE):
                batch = [self._sessions.read(id_) for id_ in ids[at : at + _LISTED_AT_ONCE]]
                for reply in self._link.run(*batch):
                    stored = rows.stored_from(reply)
                    if stored is not None:
                        found.append(stored)
        named, now = set(names), rows.seconds(time)
        records = [stored.record for stored in found]
        nameless = [r for r in records if r.id.encode() not in named]
        self._open.add([r for r in nameless if r.state is not SessionState.CLOSED], now)
        return self._in_order(found, now)

    def orphans(self) -> Sequence[SessionRecord]:
        return self._in_order(*self._open.orphans())

    def count_open(self) -> int:
        return self._open.count()

    def delete(self, session_id: str) -> None:
        keys = self._sessions.all_of(session_id)
        wait = self._wait.answer
        (text,) = self._link.run(("HGET", keys[0], "tenant"))
        named = ("SREM", self._keys.sessions, session_id)
        names = [named, *self._open.forget(session_id, rows.tenant_from(text))]
        replies = self._link.run(("DEL", *keys), *names, wait=wait)
        deleted, safe = replies[0], replies[1 + len(names) :]
        if not deleted:
            raise control_log.not_found(session_id)
        check_safe(self._link.address, wait, safe)

    def claim(self, session_id: str, owner: str, *, expect_epoch: int, ttl_s: float) -> Lease:
        def decide(stored: Stored, replies: Sequence[list[bytes]]) -> Change[_At]:
            now = rows.seconds(replies[0])
            record = control_log.claimed(
                stored.record, owner, expect_epoch=expect_epoch, lease_until=now + ttl_s
            )
            return Change(record, (record, now))

        record, now = self._sessions.change(session_id, decide, _TIME, told=False)
        self._open.follow(record, now)
        return Lease(session_id, owner, record.epoch)

    def renew(self, leases: Sequence[Lease], *, ttl_s: float) -> Sequence[Lease]:
        if not leases:
            self._link.run(("PING",))
            return []
        (time,) = self._link.run(_TIME)
        until = rows.as_text(rows.seconds(time) + ttl_s)
        kept = self._link.run(
            *(
                _RENEW.call(
                    [self._keys.of(lease.session_id, "session")],
                    rows.as_text(lease.owner),
                    rows.as_text(lease.epoch),
                    until,
                )
                for lease in leases
            )
        )
        return [lease for lease, held in zip(leases, kept, strict=True) if not held]

    def release(self, lease: Lease, *, state: str) -> None:
        def decide(stored: Stored, replies: Sequence[list[bytes]]) -> Change[_At]:
            record = control_log.released(stored.record, lease, state)
            return Change(record, (record, rows.seconds(replies[0])))

        self._open.follow(*self._sessions.change(lease.session_id, decide, _TIME))

    def set_state(self, session_id: str, *, state: str) -> SessionRecord:
        def decide(stored: Stored, replies: Sequence[list[bytes]]) -> Change[_At]:
            record = control_log.with_state(stored.record, state)
            return Change(record, (record, rows.seconds(replies[0])))

        record, now = self._sessions.change(session_id, decide, _TIME)
        self._open.follow(record, now)
        return self._here(record, now)

    def seal(self, lease: Lease, index: int) -> Sequence[ControlEntry]:
        def decide(stored: Stored, replies: Sequence[list[bytes]]) -> Change[list[ControlEntry]]:
            record = control_log.sealed(stored.record, lease, index)
            return Change(record, [rows.entry_from(member).entry for member in replies[0]])

        entries = self._sessions.at_chunk(lease.session_id, index)
        return self._sessions.change(lease.session_id, decide, entries, told=False)

    def commit(self, lease: Lease, index: int, digest: str, fingerprint: str) -> None:
        def decide(stored: Stored, _: Sequence[object]) -> Change[None]:
            record = control_log.committed(stored.record, lease, index, fingerprint)
            added = ("HSET", COMMITS, index, digest)
            return Change(record, None, (added, ("HDEL", COMMITS, index - DIGESTS_KEPT)))

        self._sessions.change(lease.session_id, decide, told=False)

    def digests(self, session_id: str, start: int, stop: int) -> dict[int, str]:
        end = self.get(session_id).next_index
        wanted = range(max(start, end - DIGESTS_KEPT, 0), min(stop, end))
        if not wanted:
            return {}
        (found,) = self._link.run(("HMGET", self._keys.of(session_id, "commits"), *wanted))
        with self._sessions.undamaged():
            pairs = zip(wanted, found, strict=True)
            return {n: digest.decode() for n, digest in pairs if digest is not None}

    def append_control(
        self, session_id: str, event_id: str, prompt: str, *, at_chunk: int | None = None
    ) -> ControlEntry:
        control_log.check_text("event_id", event_id)

        def decide(stored: Stored, replies: Sequence[bytes | None]) -> Change[ControlEntry]:
            earlier = self._logged(session_id, event_id, replies[0])
            logged = control_log.placed(stored.record, event_id, prompt, at_chunk, earlier)
            if logged is earlier:
                return Change(stored.record, logged.entry)
            member = rows.entry_member(stored.appended, logged)
            chunk = logged.entry.chunk
            writes: Sequence[Command] = (
                ("ZADD", LOG, chunk, member),
                ("HSET", EVENTS, event_id, chunk),
                ("HSET", SESSION, "appended", stored.appended + 1),
            )
            return Change(stored.record, logged.entry, writes)

        earlier = ("HGET", self._keys.of(session_id, "events"), event_id)
        return self._sessions.change(session_id, decide, earlier)

    def controls(self, session_id: str, start: int = 0) -> Sequence[ControlEntry]:
        members = self._sessions.of(
            session_id, ("ZRANGEBYSCORE", self._keys.of(session_id, "log"), start, "+inf")
        )
        with self._sessions.undamaged():
            return [rows.entry_from(member).entry for member in members]

    def add_snapshot(self, lease: Lease, ref: SnapshotRef) -> None:
        def decide(stored: Stored, replies: Sequence[bytes | None]) -> Change[None]:
            earlier = None if replies[0] is None else rows.snapshot_from(replies[0])[1]
            kept = control_log.recorded_snapshot(stored.record, lease, ref, earlier)
            text = rows.snapshot_text(kept, stored.recorded)
            counted = ("HSET", SESSION, "recorded", stored.recorded + 1)
            return Change(stored.record, None, (("HSET", SNAPSHOTS, ref.id, text), counted))

        self._sessions.change(
            lease.session_id, decide, self._sessions.snapshot(lease.session_id, ref.id)
        )

    def snapshots(self, session_id: str) -> Sequence[SnapshotRef]:
        texts = self._sessions.of(session_id, ("HVALS", self._keys.of(session_id, "snapshots")))
        with self._sessions.undamaged():
            found = [rows.snapshot_from(text) for text in texts]
        found.sort(key=lambda pair: (-pair[1].chunk_index, -pair[0]))
        return [ref for _, ref in found]

    def pin_snapshot(self, session_id: str, snapshot_id: str) -> SnapshotRef:
        def decide(stored: Stored, replies: Sequence[bytes | None]) -> Change[SnapshotRef]:
            if replies[0] is None:
                raise control_log.snapshot_not_found(session_id, snapshot_id)
            position, ref = rows.snapshot_from(replies[0])
            pinned = replace(ref, pinned=True)
            text = rows.snapshot_text(pinned, position)
            return Change(stored.record, pinned, (("HSET", SNAPSHOTS, ref.id, text),))

        return self._sessions.change(
            session_id, decide, self._sessions.snapshot(session_id, snapshot_id)
        )

    def drop_snapshot(self, session_id: str, snapshot_id: str) -> None:
        def decide(stored: Stored, replies: Sequence[bytes | None]) -> Change[None]:
            if replies[0] is None:
                return Change(stored.record, None)
            control_log.check_droppable(rows.snapshot_from(replies[0])[1])
            return Change(stored.record, None, (("HDEL", SNAPSHOTS, snapshot_id),))

        held = self._sessions.snapshot(session_id, snapshot_id)
        self._sessions.change(session_id, decide, held)

    def put_replica(self, record: ReplicaRecord, *, ttl_s: float) -> None:
        (time,) = self._link.run(_TIME)
        now, alive = rows.seconds(time), self._keys.alive
        text = rows.replica_text(replace(record, alive_until=now + ttl_s))
        kept_ms = int((ttl_s + _REPLICA_KEPT_S) * 1000)
        listed = "SADD" if record.state == "draining" else "SREM"
        self._link.run(
            ("SET", self._keys.replica(record.id), text, "PX", kept_ms),
            ("ZADD", alive, now + ttl_s, record.id),
            ("ZREMRANGEBYSCORE", alive, "-inf", now - _REPLICA_KEPT_S),
            ("PEXPIRE", alive, kept_ms),
            (listed, self._keys.draining, record.id),
        )

    def remove_replica(self, replica_id: str) -> None:
        self._link.run(
            ("DEL", self._keys.replica(replica_id)),
            ("ZREM", self._keys.alive, replica_id),
            ("SREM", self._keys.draining, replica_id),
        )

    def replicas(
        self, *, among: int | None = None, named: Collection[str] = ()
    ) -> Sequence[ReplicaRecord]:
        check_among(among)
        drawn: Command = ("ZRANGEBYSCORE", self._keys.alive, "-inf", "+inf")
        if among is not None:
            drawn = ("ZRANDMEMBER", self._keys.alive, among)
        # The dead are among them, for the minute until they are forgotten.
        raw, time = self._link.run(drawn, _TIME)
        return self._living({*(i.decode() for i in raw), *named}, rows.seconds(time))

    def draining(self) -> Sequence[ReplicaRecord]:
        raw, time = self._link.run(("SMEMBERS", self._keys.draining), _TIME)
        ids = {i.decode() for i in raw}
        found = self._living(ids, rows.seconds(time))
        if gone := ids - {r.id for r in found}:
            # Nobody took them off the list. One that comes back puts itself on it again.
            self._link.run(("SREM", self._keys.draining, *gone))
        return [r for r in found if r.state == "draining"]

    def _living(self, ids: Collection[str], now: float) -> Sequence[ReplicaRecord]:
        """Those of the replicas that are alive, by id; `now` is the server's."""
        if not ids:
            return []
        ahead_s = now - self._clock.wall()
        with self._sessions.undamaged():
            (texts,) = self._link.run(("MGET", *(self._keys.replica(id_) for id_ in ids)))
            found = [rows.replica_from(text) for text in texts if text is not None]
        alive = [r for r in found if r.alive_until > now]
        alive.sort(key=lambda r: r.id)
        return [replace(r, alive_until=r.alive_until - ahead_s) for r in alive]

    def _in_order(self, found: Iterable[Stored], now: float) -> Sequence[SessionRecord]:
        ordered = sorted(found, key=lambda s: (s.record.created_at, s.seq))
        return [self._here(stored.record, now) for stored in ordered]

    def _here(self, record: SessionRecord, now: float) -> SessionRecord:
        """The record in the caller's time; `now` is the server's."""
        if not record.lease_until:
            return record
        return replace(record, lease_until=record.lease_until - now + self._clock.wall())

    def _logged(self, session_id: str, event_id: str, chunk: bytes | None) -> LoggedControl | None:
        if chunk is None:
            return None
        if chunk.isdigit():
            (members,) = self._link.run(self._sessions.at_chunk(session_id, int(chunk)))
            for logged in map(rows.entry_from, members):
                if logged.entry.event_id == event_id:
                    return logged
        raise Damaged(f"event {event_id!r} is listed for chunk {chunk!r}, but not in the log")
