"""From configuration to stores: the one place that knows which backends there are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from echo_ray.clock import Clock
from echo_ray.config import RedisSection, StorageSection
from echo_ray.errors import ConfigError
from echo_ray.storage.interface import Directory, SnapshotStore
from echo_ray.storage.local import LocalDirectory, LocalSnapshots
from echo_ray.storage.memory import MemoryDirectory, MemorySnapshots

if TYPE_CHECKING:
    from echo_ray.storage.redis_link import RedisServer

DATABASE = "directory.sqlite3"
SNAPSHOTS = "snapshots"


def open_directory(config: StorageSection, clock: Clock) -> Directory:
    """The session directory of that configuration; `memory` is a new, empty one at every call."""
    match config.backend:
        case "local":
            return LocalDirectory(_folder(config) / DATABASE, clock)
        case "memory":
            return MemoryDirectory(clock)
        case "redis":
            server = _redis(config.redis)
            from echo_ray.storage.redis_directory import RedisDirectory

            return RedisDirectory(
                server,
                clock,
                prefix=config.redis.prefix,
                durability=config.redis.durability,
                replicas=config.redis.replicas,
            )
        case other:
            raise _unknown(other)


def open_snapshots(config: StorageSection) -> SnapshotStore:
    """The snapshot store of that configuration; `memory` is a new, empty one at every call."""
    match config.backend:
        case "local":
            return LocalSnapshots(_folder(config) / SNAPSHOTS, config.snapshot_limit_bytes)
        case "memory":
            return MemorySnapshots(config.snapshot_limit_bytes)
        case "redis":
            server = _redis(config.redis)
            from echo_ray.storage.redis_snapshots import RedisSnapshots

            return RedisSnapshots(
                server,
                prefix=config.redis.prefix,
                limit_bytes=config.snapshot_limit_bytes,
            )
        case other:
            raise _unknown(other)


def _folder(config: StorageSection) -> Path:
    return Path(config.path).expanduser()


def _redis(section: RedisSection) -> RedisServer:
    """Where the server is, with the password read now. Raises `ConfigError`."""
    try:
        from echo_ray.storage.redis_link import RedisServer
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"storage.backend: {error.name!r} is not installed; pip install 'echo-ray[cluster]'",
            param="storage.backend",
        ) from error
    return RedisServer(
        url=section.url,
        username=section.username,
        password=_password(section),
        ca_file=section.ca_file,
        cert_file=section.cert_file,
        key_file=section.key_file,
        timeout_s=section.timeout_s,
    )


def _password(section: RedisSection) -> str | None:
    if section.password_env is not None:
        if section.password_env not in os.environ:
            raise ConfigError(
                f"storage.redis.password_env: the environment has no variable called "
                f"{section.password_env!r}; set it to the password",
                param="storage.redis.password_env",
            )
        return os.environ[section.password_env]
    if section.password_file is not None:
        file = Path(section.password_file).expanduser()
        try:
            return file.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"storage.redis.password_file: {file} cannot be read ({type(error).__name__}); "
                "write the password into it",
                param="storage.redis.password_file",
            ) from error
    return None


def _unknown(backend: str) -> ConfigError:
    return ConfigError(f"storage.backend: no store is called {backend!r}", param="storage.backend")
