"""From configuration to stores: the one place that knows which backends there are.

Redis and S3 are imported only where a backend uses them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from echo_ray.clock import Clock
from echo_ray.config import RedisSection, StorageSection
from echo_ray.errors import ConfigError
from echo_ray.storage.interface import Directory, SweptStore
from echo_ray.storage.local import LocalDirectory, LocalSnapshots
from echo_ray.storage.memory import MemoryDirectory, MemorySnapshots
from echo_ray.storage.timed import Tell, TimedSnapshots

if TYPE_CHECKING:
    from echo_ray.storage.redis_directory import RedisDirectory
    from echo_ray.storage.redis_link import RedisServer
    from echo_ray.storage.redis_snapshots import RedisSnapshots
    from echo_ray.storage.restore import Restorer
    from echo_ray.storage.s3_snapshots import S3Snapshots

DATABASE = "directory.sqlite3"
SNAPSHOTS = "snapshots"


def open_directory(config: StorageSection, clock: Clock) -> Directory:
    """The session directory of that configuration; `memory` is a new, empty one at every call.

    Raises `ConfigError` if the server cannot keep its promises, `StoreUnavailable` if it does not
    answer.
    """
    match config.backend:
        case "local":
            return LocalDirectory(_folder(config) / DATABASE, clock)
        case "memory":
            return MemoryDirectory(clock)
        case "redis":
            return _redis_directory(config.redis, clock)
        case "s3" | "tiered":
            return _kept_directory(config, clock)
        case other:
            raise _unknown(other)


def open_snapshots(config: StorageSection, tell: Tell | None = None) -> SweptStore:
    """The snapshot store of that configuration; `memory` is a new, empty one at every call.

    `tell` hears of every write and read, by tier. Asks no server anything; `check_stores` does.
    """

    def timed(store: SweptStore, tier: str | None = None) -> SweptStore:
        return store if tell is None else TimedSnapshots(store, tier or store.name, tell)

    match config.backend:
        case "local":
            return timed(LocalSnapshots(_folder(config) / SNAPSHOTS, config.snapshot_limit_bytes))
        case "memory":
            return timed(MemorySnapshots(config.snapshot_limit_bytes))
        case "redis":
            return timed(_redis_snapshots(config))
        case "s3":
            return timed(_s3_snapshots(config))
        case "tiered":
            from echo_ray.storage.tiered import TieredSnapshots

            store = TieredSnapshots(
                timed(_redis_snapshots(config), "hot"),
                timed(_s3_snapshots(config), "durable"),
                durable_every=config.s3.durable_every,
            )
            store.start()
            return store
        case other:
            raise _unknown(other)


def open_restorer(config: StorageSection, clock: Clock) -> Restorer | None:
    """What brings sessions back when Redis lost them; None where nothing outlives the directory.

    Raises as `open_directory`.
    """
    if config.backend not in ("s3", "tiered"):
        return None
    from echo_ray.storage.redis_identity import Identity
    from echo_ray.storage.redis_link import RedisLink
    from echo_ray.storage.restore import Restorer

    link = RedisLink(_redis(config.redis))
    return Restorer(
        _redis_directory(config.redis, clock),
        _s3_snapshots(config),
        Identity(link, config.redis.prefix),
        clock,
        limit_bytes=config.snapshot_limit_bytes,
        close=link.close,
    )


def check_stores(config: StorageSection, clock: Clock) -> None:
    """Try everything once, before a service starts. Raises what is wrong, with the remedy."""
    open_directory(config, clock).close()
    if config.backend in ("s3", "tiered"):
        store = _s3_snapshots(config)
        try:
            store.check()
        finally:
            store.close()


def _folder(config: StorageSection) -> Path:
    return Path(config.path).expanduser()


def _redis_directory(section: RedisSection, clock: Clock) -> RedisDirectory:
    server = _redis(section)
    from echo_ray.storage.redis_directory import RedisDirectory

    return RedisDirectory(
        server,
        clock,
        prefix=section.prefix,
        durability=section.durability,
        replicas=section.replicas,
    )


def _kept_directory(config: StorageSection, clock: Clock) -> Directory:
    server, section = _redis(config.redis), config.redis
    from echo_ray.storage.kept_directory import KeptDirectory

    return KeptDirectory(
        server,
        clock,
        lambda: _s3_snapshots(config),
        prefix=section.prefix,
        durability=section.durability,
        replicas=section.replicas,
    )


def _redis_snapshots(config: StorageSection) -> RedisSnapshots:
    server = _redis(config.redis)
    from echo_ray.storage.redis_snapshots import RedisSnapshots

    limit_bytes = config.snapshot_limit_bytes
    return RedisSnapshots(server, prefix=config.redis.prefix, limit_bytes=limit_bytes)


def _s3_snapshots(config: StorageSection) -> S3Snapshots:
    section = config.s3
    with _installed():
        from echo_ray.storage.s3_snapshots import S3Snapshots
    return S3Snapshots(
        section.bucket,
        prefix=section.prefix,
        endpoint=section.endpoint,
        region=section.region,
        path_style=section.path_style,
        profile=section.profile,
        encryption=section.encryption,
        kms_key_id=section.kms_key_id,
        conditional_writes=section.conditional_writes,
        limit_bytes=config.snapshot_limit_bytes,
        timeout_s=section.timeout_s,
    )


def _redis(section: RedisSection) -> RedisServer:
    """Where the server is, with the password read now. Raises `ConfigError`."""
    with _installed():
        from echo_ray.storage.redis_link import RedisServer
    return RedisServer(
        url=section.url,
        username=section.username,
        password=_password(section),
        ca_file=section.ca_file,
        cert_file=section.cert_file,
        key_file=section.key_file,
        timeout_s=section.timeout_s,
    )


@contextmanager
def _installed() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"storage.backend: {error.name!r} is not installed; pip install 'echo-ray[cluster]'",
            param="storage.backend",
        ) from error


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
