"""Connections to one Redis server: commands in pipelines, scripts, and what failures mean.

Knows nothing about sessions; `redis_rows.py` says which keys there are. The module `redis` is used
for its connections (TLS, authentication, replies) and nothing above them: its own retries are off.

A command whose connection breaks is sent once more on a new one, so everything sent here must bear
being done twice. A command that is not answered in time is not repeated: it may still be done
later, when the server goes on.
"""

from __future__ import annotations

import hashlib
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from redis import exceptions as failures
from redis.backoff import NoBackoff
from redis.connection import BlockingConnectionPool, Connection, SSLConnection
from redis.retry import Retry

from echo_ray.errors import EchoError, StoreCorrupt, StoreFull, StoreUnavailable

Command = tuple[Any, ...]
CONNECTIONS = 32
"""Most connections of one link: as many threads as an event loop's executor has."""
FSYNC_WAIT_S = 5.0
"""How long a write may wait for the server's disk; `appendfsync everysec` takes one to two."""
_CLUSTER = (
    failures.MovedError,
    failures.AskError,
    failures.ClusterDownError,
    failures.ClusterCrossSlotError,
)


class Script:
    """A Lua script, known to the server by its digest."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.digest = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()

    def call(self, keys: Sequence[str], *arguments: Any) -> Command:
        return ("EVALSHA", self.digest, len(keys), *keys, *arguments)


@dataclass(frozen=True, kw_only=True, slots=True)
class RedisServer:
    """Where a server is and how it lets us in. The password is in no `repr`."""

    url: str = "redis://127.0.0.1:6379/0"
    """`redis://HOST:PORT/DB`, or `rediss://` for TLS; without user and password."""
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    timeout_s: float = 1.0
    """For connecting, and for each answer."""

    def connection_arguments(self) -> dict[str, Any]:
        """What a connection of the module `redis` is made with."""
        parts = urlsplit(self.url)
        arguments: dict[str, Any] = {
            "host": parts.hostname,
            "port": parts.port or 6379,
            "db": int(parts.path.strip("/") or 0),
            "username": self.username,
            "password": self.password,
            "socket_timeout": self.timeout_s,
            "socket_connect_timeout": self.timeout_s,
            "socket_keepalive": True,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
            "driver_info": None,
        }
        if parts.scheme == "rediss":
            arguments |= {
                "connection_class": SSLConnection,
                "ssl_ca_certs": self.ca_file,
                "ssl_certfile": self.cert_file,
                "ssl_keyfile": self.key_file,
                "ssl_min_version": ssl.TLSVersion.TLSv1_2,
            }
        else:
            arguments["connection_class"] = Connection
        return arguments


class RedisLink:
    """Connections to one server, for any number of threads."""

    def __init__(self, server: RedisServer, scripts: Sequence[Script] = ()) -> None:
        self.address = server.url
        self.timeout_s = server.timeout_s
        self._scripts = scripts
        self._closed = threading.Event()
        self._pool = BlockingConnectionPool(
            max_connections=CONNECTIONS, timeout=server.timeout_s, **server.connection_arguments()
        )

    def run(self, *commands: Command, wait: Sequence[Command] = ()) -> list[Any]:
        """Send all in one go; returns one reply each, of bytes, numbers, lists and None.

        `wait` holds commands that block until the writes before them are safe; their replies come
        last. Raises `StoreUnavailable`, `StoreFull`, `StoreCorrupt`.
        """
        if self._closed.is_set():
            raise self._over()
        try:
            replies = self._exchange_again(commands, wait)
            if any(isinstance(reply, failures.NoScriptError) for reply in replies):
                loads = [("SCRIPT", "LOAD", script.source) for script in self._scripts]
                _raise_first(self._exchange_again(loads, ()))
                replies = self._exchange_again(commands, wait)
            _raise_first(replies)
        except (failures.RedisError, OSError) as error:
            raise self._over() if self._closed.is_set() else self._meaning(error) from error
        except (AttributeError, ValueError) as error:
            # What `redis` says in a thread whose connection another one closes.
            if self._closed.is_set():
                raise self._over() from error
            raise
        return replies

    def close(self) -> None:
        """Close all connections, also those that wait for an answer; twice is allowed."""
        self._closed.set()
        self._pool.disconnect()

    def damaged(self, what: str) -> StoreCorrupt:
        """The answer when a key holds what this release cannot have written."""
        return StoreCorrupt(
            f"{self.address}: {what}; delete the key or restore the server's files from a backup"
        )

    def _over(self) -> StoreUnavailable:
        return StoreUnavailable(f"{self.address}: the store is closed; open it again")

    def _exchange_again(self, commands: Sequence[Command], wait: Sequence[Command]) -> list[Any]:
        try:
            return self._exchange(commands, wait)
        except (failures.AuthenticationError, failures.TimeoutError):
            raise
        except failures.ConnectionError:
            return self._exchange(commands, wait)

    def _exchange(self, commands: Sequence[Command], wait: Sequence[Command]) -> list[Any]:
        connection: Any = self._pool.get_connection()
        try:
            connection.send_packed_command(connection.pack_commands([*commands, *wait]))
            replies = [_reply(connection.read_response) for _ in commands]
            slow = self.timeout_s + FSYNC_WAIT_S
            replies += [_reply(connection.read_response, timeout=slow) for _ in wait]
        except BaseException:
            connection.disconnect()
            raise
        else:
            return replies
        finally:
            self._pool.release(connection)

    def _meaning(self, error: Exception) -> EchoError:
        text = f"{self.address}: {error}"
        if isinstance(error, failures.OutOfMemoryError):
            return StoreFull(f"{text}; raise the server's maxmemory or delete sessions")
        if "No space left" in str(error):
            return StoreFull(f"{text}; free disk space on the server")
        if str(error).startswith("WRONGTYPE"):
            return self.damaged(f"a key is of another kind than expected ({error})")
        if isinstance(error, failures.TimeoutError):
            return StoreUnavailable(
                f"{self.address}: no answer within {self.timeout_s} s (storage.redis.timeout_s); "
                "see to the server, what was asked may or may not be done",
                retry_after_s=1,
            )
        return StoreUnavailable(f"{text}; {_remedy(error)}", retry_after_s=1)


def _reply(read: Callable[..., Any], **arguments: Any) -> Any:
    """One reply; error replies as values, so that the ones after them are read too."""
    try:
        return read(disable_decoding=True, **arguments)
    except failures.ResponseError as error:
        return error


def _raise_first(replies: Sequence[Any]) -> None:
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, list):
            _raise_first(reply)


def _remedy(error: Exception) -> str:
    if isinstance(error, failures.AuthenticationError):
        return "check storage.redis.username and the password"
    if isinstance(error, failures.NoPermissionError):
        return "give the user the rights in docs/operations.md"
    if isinstance(error, failures.ReadOnlyError):
        return "this server is a replica, name the primary in storage.redis.url"
    if isinstance(error, _CLUSTER):
        return "Redis Cluster is not supported, name a server that is no part of one"
    if "certificate" in str(error).lower() or "ssl" in str(error).lower():
        return "check rediss:// and storage.redis.ca_file, cert_file and key_file"
    return "see to the server and storage.redis.url"
