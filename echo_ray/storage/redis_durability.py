"""What must be on the server's disk before an answer is given, and what a server must be like.

Redis appends every write to its log in order, so a crash loses the end of the log and nothing
before it. What a lost end does depends on what was shown to somebody already:

* A session created, an event accepted, a state set, a snapshot pinned or forgotten: somebody was
  told so. These must be on disk before the answer.
* A commit on its own: the chunk is generated again from the same controls, bit for bit.
* A claim: whatever was committed under it comes later in the log, so if the claim is lost then so
  is all of that. Two owners under one epoch differ in name, and the fence compares both.
* A renewal or a heartbeat: it only looks late.
* **A seal.** Viewers have seen chunk n; its seal and commit are lost; an event comes and is pinned
  to chunk n, which is open again. Every later owner generates n with the event, and what viewers
  saw never existed. The same holds for an event that chunk n was generated with but that was lost
  before its own acknowledgement. So what is shown must be on disk first: seal and commit of chunk n
  before it is published.

`durability: always` is that: the server runs with `appendfsync always` and answers a write only
after the disk has it, one flush for all writes that came meanwhile. Nothing is sent for it.

With `appendfsync everysec` a write can be waited for (WAITAOF), but that takes until the next
flush, a second each. Answers to callers can wait so long, every chunk of every stream cannot. So
`durability: everysec` waits for the first kind only; a server or machine that *crashes* may cost a
stream about a second of seals, and with bad luck a torn picture: said at start. (A server that
shuts down in order loses nothing.) `durability: memory` waits for nothing.

`replicas: n` waits for n replicas of the server too, in every mode and for seals and commits as
well (WAIT). It narrows what a failover can lose; Redis does not promise that it closes it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from echo_ray.errors import ConfigError, StoreUnavailable
from echo_ray.storage.redis_link import FSYNC_WAIT_S, Command, RedisLink

_OLDEST = {"always": (7, 0), "everysec": (7, 2), "memory": (7, 0)}


@dataclass(frozen=True, slots=True)
class Waits:
    """Commands that follow a write and block until it is safe."""

    answer: tuple[Command, ...]
    """After a write that somebody is told of."""
    chunk: tuple[Command, ...]
    """After a claim, a seal or a commit."""


def waits_for(durability: str, replicas: int) -> Waits:
    """What to send after writes."""
    wait_ms = int(FSYNC_WAIT_S * 1000)
    copied: tuple[Command, ...] = (("WAIT", replicas, wait_ms),) if replicas else ()
    flushed: tuple[Command, ...] = (("WAITAOF", 1, 0, wait_ms),)
    return Waits(answer=copied + flushed if durability == "everysec" else copied, chunk=copied)


def check_safe(address: str, wait: Sequence[Command], replies: Sequence[Any]) -> None:
    """Raise `StoreUnavailable` if the disk or the replicas did not confirm a write in time."""
    for command, reply in zip(wait, replies, strict=True):
        asked, got = int(command[1]), reply[0] if isinstance(reply, list) else reply
        if got < asked:
            what = "flushed to disk" if command[0] == "WAITAOF" else f"on {got} of {asked} replicas"
            raise StoreUnavailable(
                f"{address}: a write was made but after {FSYNC_WAIT_S} s it is only "
                f"{'not yet ' if command[0] == 'WAITAOF' else ''}{what}; see to the server's disk "
                "and replicas, then try again",
                retry_after_s=1,
            )


def check_server(link: RedisLink, durability: str) -> None:
    """Refuse a server that cannot keep the promise. Raises `StoreUnavailable`, `ConfigError`."""
    (reply,) = link.run(("INFO", "everything"))
    info = dict(
        line.split(":", 1) for line in reply.decode(errors="replace").split("\r\n") if ":" in line
    )
    at, version = link.address, info.get("redis_version", "0.0")
    if info.get("redis_mode") == "cluster":
        raise ConfigError(
            f"{at}: this server is part of a Redis Cluster, which is not supported; name one that "
            "is not",
            param="storage.redis.url",
        )
    oldest = _OLDEST[durability]
    if tuple(int(part) for part in version.split(".")[:2]) < oldest:
        raise ConfigError(
            f"{at}: Redis {version} is too old for durability {durability!r}; "
            f"{oldest[0]}.{oldest[1]} or newer",
            param="storage.redis.durability",
        )
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise ConfigError(
            f"{at}: maxmemory-policy is {policy!r}, which deletes sessions when memory is short; "
            "set it to noeviction",
            param="storage.redis.url",
        )
    if durability == "memory":
        _warn(
            f"{at}: storage.redis.durability is 'memory': when the server stops, sessions and "
            "accepted events since its last save are lost, and viewers may see other pictures than "
            "before; use 'always' for anything that matters"
        )
        return
    _check_log(link, info, durability)


def _check_log(link: RedisLink, info: dict[str, str], durability: str) -> None:
    at = link.address
    if info.get("aof_enabled") != "1":
        raise ConfigError(
            f"{at}: appendonly is off, so what was accepted would be lost when the server stops; "
            "set `appendonly yes` there, or storage.redis.durability to 'memory'",
            param="storage.redis.durability",
        )
    if durability == "everysec":
        _warn(
            f"{at}: storage.redis.durability is 'everysec': if the server or its machine crashes, "
            "streams may lose about a second of seals and show a torn picture once, and accepting "
            "an event takes a second; set `appendfsync always` and durability 'always'"
        )
        return
    (reply,) = link.run(("CONFIG", "GET", "appendfsync"))
    (_, mode) = reply or (b"", b"unknown")
    if mode != b"always":
        raise ConfigError(
            f"{at}: appendfsync is {mode.decode()!r}, but storage.redis.durability is 'always'; "
            "set `appendfsync always` there, or the durability to 'everysec'",
            param="storage.redis.durability",
        )


@lru_cache(maxsize=64)
def _warn(text: str) -> None:
    """Say it once per process."""
    logging.getLogger(__name__).warning(text)
