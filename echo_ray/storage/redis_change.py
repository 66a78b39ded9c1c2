"""One session's keys on a Redis server: reading them, and changing them by compare and set.

A change reads, lets a rule decide, and writes through one script: if the session's version is still
the one that was read, make these writes and set a new version; else read again. Every attempt of
one change carries the same new version, so that a change whose answer was lost is recognised when
the session is read again. A change that was overtaken a few times gets the next turn: for a moment
the script refuses everybody else, so that an owner's seal cannot starve among busy viewers.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from echo_ray.errors import StoreUnavailable
from echo_ray.session import control_log
from echo_ray.session.control_log import LoggedControl
from echo_ray.session.forking import Past
from echo_ray.session.records import SessionRecord
from echo_ray.storage import redis_rows as rows
from echo_ray.storage.redis_durability import Waits, check_safe
from echo_ray.storage.redis_link import Command, RedisLink, Script
from echo_ray.storage.redis_rows import Damaged, Keys, Stored

T = TypeVar("T")

# ARGV: the version expected, the new one, the ms for which to ask for the next turn, the writes.
# Fails at the first write or not at all: keys of another kind and full memory show there, and
# `version` comes last.
SET_IF_SAME = Script("""
local turn = redis.call('GET', KEYS[6])
if turn and turn ~= ARGV[2] then return 0 end
local version = redis.call('HGET', KEYS[1], 'version') or ''
if version ~= ARGV[1] then
  if ARGV[3] == '0' or version == '' then return 0 end
  redis.call('SET', KEYS[6], ARGV[2], 'PX', ARGV[3])
  return 2
end
local at = 4
while at <= #ARGV do
  local last = at + tonumber(ARGV[at])
  redis.call(ARGV[at + 1], KEYS[tonumber(ARGV[at + 2])], unpack(ARGV, at + 3, last))
  at = last + 1
end
redis.call('HSET', KEYS[1], 'version', ARGV[2])
if turn then redis.call('DEL', KEYS[6]) end
return 1
""")
WHAT = ("session", "log", "events", "commits", "snapshots", "turn")
SESSION, LOG, EVENTS, COMMITS, SNAPSHOTS = range(1, 6)
"""Which of a session's keys a write goes to."""
_ATTEMPTS = 100
_PATIENCE = 4
"""After so many attempts a change asks for the next turn."""
_TURN_MS = 250
"""How long others hold back for a change that then does not come."""
OVERTAKEN, DONE, OWN_TURN = range(3)
"""What the script answers."""
_LONGEST_PAUSE_S = 0.05
_PAIRS_AT_ONCE = 1000
"""Of one write; Lua hands about 8,000 values on to a command at most."""


@dataclass(slots=True)
class Change(Generic[T]):
    """What a rule decided: the session as it should be, writes to its other keys, the answer."""

    record: SessionRecord
    answer: T
    writes: Sequence[Command] = ()


class SessionKeys:
    """Reads and changes sessions."""

    def __init__(self, link: RedisLink, keys: Keys, wait: Waits) -> None:
        self._link = link
        self._keys = keys
        self._wait = wait

    def change(
        self,
        session_id: str,
        decide: Callable[[Stored, Sequence[Any]], Change[T]],
        *reads: Command,
        told: bool = True,
    ) -> T:
        """Read, decide, write if nothing changed since; again if something did."""
        keys, version = self.all_of(session_id), secrets.token_hex(8)
        change: Change[T] | None = None
        for attempt in range(_ATTEMPTS):
            reply, *others = self._link.run(self.read(session_id), *reads)
            stored = self.found(session_id, reply)
            if change is not None and stored.version == version:
                self.settle(told=told)
                return change.answer
            with self.undamaged():
                change = decide(stored, others)
            changed = rows.changed_fields(stored.record, change.record)
            writes = [*change.writes, *([("HSET", SESSION, *flat(changed))] if changed else [])]
            if not writes:
                self.settle(told=told)
                return change.answer
            turn_ms = _TURN_MS if attempt >= _PATIENCE else 0
            done = self.write(keys, stored.version, version, writes, told=told, turn_ms=turn_ms)
            if done == DONE:
                return change.answer
            if done == OVERTAKEN:
                time.sleep(random.uniform(0, min(_LONGEST_PAUSE_S, 0.0005 * 2 ** min(attempt, 10))))
        raise StoreUnavailable(
            f"{self._link.address}: session {session_id!r} was changed by others in each of "
            f"{_ATTEMPTS} attempts; try again",
            retry_after_s=1,
        )

    def write(
        self,
        keys: Sequence[str],
        expected: str,
        version: str,
        writes: Sequence[Command],
        *,
        told: bool,
        turn_ms: int = 0,
    ) -> int:
        """Make the writes if the version is still the expected one; returns what came of it."""
        arguments: list[object] = []
        for write in writes:
            arguments += (len(write), *write)
        wait = self._wait.answer if told else self._wait.chunk
        done, *safe = self._link.run(
            SET_IF_SAME.call(keys, expected, version, turn_ms, *arguments), wait=wait
        )
        if done == DONE:
            check_safe(self._link.address, wait, safe)
        return int(done)

    def settle(self, *, told: bool) -> None:
        """Wait for what was written before: the answer may be to somebody's second try.

        A connection waits for its own writes only, so this makes one.
        """
        wait = self._wait.answer if told else self._wait.chunk
        if wait:
            _, *safe = self._link.run(("INCR", self._keys.waited), wait=wait)
            check_safe(self._link.address, wait, safe)

    def read(self, session_id: str) -> Command:
        return ("HGETALL", self._keys.of(session_id, "session"))

    def at_chunk(self, session_id: str, chunk: int) -> Command:
        return ("ZRANGEBYSCORE", self._keys.of(session_id, "log"), chunk, chunk)

    def snapshot(self, session_id: str, snapshot_id: str) -> Command:
        control_log.check_text("snapshot_id", snapshot_id)
        return ("HGET", self._keys.of(session_id, "snapshots"), snapshot_id)

    def all_of(self, session_id: str) -> list[str]:
        return [self._keys.of(session_id, what) for what in WHAT]

    def of(self, session_id: str, command: Command) -> list[bytes]:
        """What belongs to a session; it is looked at first, so that it is whole if there."""
        found, there = self._link.run(command, ("EXISTS", self._keys.of(session_id, "session")))
        if not there:
            raise control_log.not_found(session_id)
        return list(found)

    def found(self, session_id: str, reply: list[bytes]) -> Stored:
        with self.undamaged():
            stored = rows.stored_from(reply)
        if stored is None:
            raise control_log.not_found(session_id)
        return stored

    @contextmanager
    def undamaged(self) -> Iterator[None]:
        try:
            yield
        except (Damaged, UnicodeDecodeError) as error:
            raise self._link.damaged(str(error)) from error


def flat(fields: dict[str, str]) -> list[str]:
    return [part for pair in fields.items() for part in pair]


def past_writes(past: Past) -> Iterator[Command]:
    """The writes that give a new session its log, digests and snapshot references."""
    entries = [LoggedControl(entry, None) for entry in past.controls]
    log = [(e.entry.chunk, rows.entry_member(at, e)) for at, e in enumerate(entries)]
    yield from _pairs("ZADD", LOG, log)
    yield from _pairs("HSET", EVENTS, [(e.entry.event_id, e.entry.chunk) for e in entries])
    yield from _pairs("HSET", COMMITS, list(past.digests.items()))
    texts = [(ref.id, rows.snapshot_text(ref, at)) for at, ref in enumerate(past.snapshots)]
    yield from _pairs("HSET", SNAPSHOTS, texts)


def _pairs(verb: str, key: int, pairs: Sequence[tuple[Any, Any]]) -> Iterator[Command]:
    for at in range(0, len(pairs), _PAIRS_AT_ONCE):
        batch = pairs[at : at + _PAIRS_AT_ONCE]
        yield (verb, key, *(part for pair in batch for part in pair))
