"""From configuration to stores: the one place that knows which backends there are."""

from __future__ import annotations

from pathlib import Path

from echo_ray.clock import Clock
from echo_ray.config import StorageSection
from echo_ray.errors import ConfigError
from echo_ray.storage.interface import Directory, SnapshotStore
from echo_ray.storage.local import LocalDirectory, LocalSnapshots
from echo_ray.storage.memory import MemoryDirectory, MemorySnapshots

DATABASE = "directory.sqlite3"
SNAPSHOTS = "snapshots"


def open_directory(config: StorageSection, clock: Clock) -> Directory:
    """The session directory of that configuration; `memory` is a new, empty one at every call."""
    match config.backend:
        case "local":
            return LocalDirectory(_folder(config) / DATABASE, clock)
        case "memory":
            return MemoryDirectory(clock)
        case other:
            raise _unknown(other)


def open_snapshots(config: StorageSection) -> SnapshotStore:
    """The snapshot store of that configuration; `memory` is a new, empty one at every call."""
    match config.backend:
        case "local":
            return LocalSnapshots(_folder(config) / SNAPSHOTS, config.snapshot_limit_bytes)
        case "memory":
            return MemorySnapshots(config.snapshot_limit_bytes)
        case other:
            raise _unknown(other)


def _folder(config: StorageSection) -> Path:
    return Path(config.path).expanduser()


def _unknown(backend: str) -> ConfigError:
    return ConfigError(f"storage.backend: no store is called {backend!r}", param="storage.backend")
