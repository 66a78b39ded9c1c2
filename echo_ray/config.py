"""The configuration tree: frozen, checked when built, one section per room.

`from_mapping` turns plain data (YAML, JSON, Ray Serve `args`) into the tree and refuses every key
it does not know. Only secrets and addresses ever come from the environment, and none do here.
"""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from echo_ray.config_access import AccessSection
from echo_ray.config_model import ModelSection as ModelSection
from echo_ray.config_rules import require as require
from echo_ray.config_telemetry import TelemetrySection
from echo_ray.errors import ConfigError

T = TypeVar("T")

_EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")
"""Numbers that YAML 1.1 reads as texts unless they have both a point and a signed exponent."""

_REDIS_URL = re.compile(r"rediss?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[0-9]*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionSection:
    """Rules of a session's life: ownership, pacing, retention."""

    lease_ttl_s: float = 1.5
    lease_renew_s: float = 0.25
    beat_s: float = 0.2
    """A replica tells each reader that it is alive this often."""
    silence_s: float = 1.2
    """A reader that hears neither a beat nor a segment for this long gives the owner up."""
    lead_chunks: int = 3
    """A session is generated at most this many chunks ahead of playout."""
    retention_chunks: int = 64
    """Segments kept in memory for viewers who ask for a past index."""
    snapshots_kept: int = 4
    """Unpinned snapshots kept per session; older ones are deleted."""
    idle_grace_s: float = 5.0
    """A session without viewers goes on this long before `on_idle` applies."""
    sweep_s: float = 2.0
    """Routers look for sessions that nobody owns this often."""
    drain_s: float = 20.0
    """A replica that is to go away has its sessions moved within this time; the rest is parked."""
    resume_policy: str = "exact"
    """`exact`: a session goes on only where the same bits are made, and waits otherwise.
    `compatible`: on any device of the same model, with the `discontinuity` mark."""

    def __post_init__(self) -> None:
        for name in (
            "lease_ttl_s",
            "lease_renew_s",
            "beat_s",
            "silence_s",
            "idle_grace_s",
            "sweep_s",
            "drain_s",
        ):
            value = getattr(self, name)
            require(
                0 < value <= 3600, f"session.{name}", value, "more than 0, at most 3600 seconds"
            )
        require(
            self.lease_renew_s * 3 <= self.lease_ttl_s,
            "session.lease_renew_s",
            self.lease_renew_s,
            f"at most a third of session.lease_ttl_s ({self.lease_ttl_s})",
        )
        require(
            self.beat_s * 3 <= self.silence_s,
            "session.beat_s",
            self.beat_s,
            f"at most a third of session.silence_s ({self.silence_s})",
        )
        known = self.resume_policy in ("exact", "compatible")
        require(known, "session.resume_policy", self.resume_policy, "exact or compatible")
        require(1 <= self.lead_chunks <= 64, "session.lead_chunks", self.lead_chunks, "1 to 64")
        fits = 8 <= self.retention_chunks <= 100_000
        require(fits, "session.retention_chunks", self.retention_chunks, "8 to 100000")
        fits = 1 <= self.snapshots_kept <= 1000
        require(fits, "session.snapshots_kept", self.snapshots_kept, "1 to 1000")


@dataclass(frozen=True, kw_only=True, slots=True)
class RedisSection:
    """The server of the backend `redis`. Its password is never a part of the configuration."""

    url: str = "redis://127.0.0.1:6379/0"
    """`redis://HOST:PORT/DB`, or `rediss://` for TLS."""
    username: str | None = None
    password_env: str | None = None
    """Name of the environment variable that holds the password."""
    password_file: str | None = None
    """File that holds the password, where there is no such variable."""
    ca_file: str | None = None
    """Certificates that vouch for the server; None: those of the system."""
    cert_file: str | None = None
    key_file: str | None = None
    prefix: str = "echo"
    """Every key begins with this and a colon; two services share a server by two prefixes."""
    timeout_s: float = 1.0
    durability: str = "always"
    """`always`, `everysec` (as the server's `appendfsync`) or `memory`: docs/operations.md."""
    replicas: int = 0
    """Replicas of the server that must have a change before it counts."""

    def __post_init__(self) -> None:
        at = "storage.redis"
        # The value is not told: it may hold a password.
        if not _REDIS_URL.fullmatch(self.url):
            raise ConfigError(
                f"{at}.url: write it as redis://HOST:PORT/DB or rediss://HOST:PORT/DB; user and "
                f"password have keys of their own ({at}.username, {at}.password_env)",
                param=f"{at}.url",
            )
        both = self.password_env is not None and self.password_file is not None
        require(not both, f"{at}.password_file", self.password_file, "not beside password_env")
        known = self.durability in ("always", "everysec", "memory")
        require(known, f"{at}.durability", self.durability, "always, everysec or memory")
        plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}", self.prefix) is not None
        require(plain, f"{at}.prefix", self.prefix, "1 to 64 letters, digits and . _ : -")
        fits = 0.05 <= self.timeout_s <= 60
        require(fits, f"{at}.timeout_s", self.timeout_s, "0.05 to 60 seconds")
        require(0 <= self.replicas <= 16, f"{at}.replicas", self.replicas, "0 to 16")
        paired = (self.cert_file is None) == (self.key_file is None)
        require(paired, f"{at}.cert_file", self.cert_file, "together with key_file")


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Section:
    """The bucket of the backends `s3` and `tiered`; credentials as every AWS client finds them."""

    bucket: str = ""
    prefix: str = "echo-ray"
    endpoint: str | None = None
    """A server other than AWS."""
    region: str | None = None
    path_style: bool = False
    """The bucket in the path instead of the host name (MinIO, Ceph)."""
    profile: str | None = None
    encryption: str = "none"
    kms_key_id: str | None = None
    conditional_writes: bool = True
    timeout_s: float = 30.0
    durable_every: int = 6
    """With `tiered`, the first and then every Nth snapshot of a session goes to S3 as well."""

    def __post_init__(self) -> None:
        known = self.encryption in ("none", "AES256", "aws:kms")
        require(known, "storage.s3.encryption", self.encryption, "none, AES256 or aws:kms")
        fits = 0.1 <= self.timeout_s <= 3600
        require(fits, "storage.s3.timeout_s", self.timeout_s, "0.1 to 3600 seconds")
        often = 1 <= self.durable_every <= 1000
        require(often, "storage.s3.durable_every", self.durable_every, "1 to 1000")


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageSection:
    """Where sessions, control logs and snapshots rest."""

    backend: str = "local"
    """`local`: one machine. `redis`: all on Redis. `s3`: snapshots on S3 instead. `tiered`:
    snapshots on Redis, and some of them on S3 too. `memory`: one process, for tests."""
    path: str = ".echo-ray"
    """Folder of the `local` backend: one SQLite database and the snapshot files."""
    snapshot_limit_bytes: int = 256 * 2**20
    sweep_s: float = 3600.0
    """Routers look for blobs that nobody needs this often; 0: never."""
    redis: RedisSection = field(default_factory=RedisSection)
    s3: S3Section = field(default_factory=S3Section)

    def __post_init__(self) -> None:
        known = self.backend in ("local", "memory", "redis", "s3", "tiered")
        require(known, "storage.backend", self.backend, "local, redis, s3, tiered or memory")
        named = bool(self.s3.bucket) or self.backend not in ("s3", "tiered")
        require(named, "storage.s3.bucket", self.s3.bucket, "name a bucket")
        require(bool(self.path), "storage.path", self.path, "name a folder")
        require(
            2**10 <= self.snapshot_limit_bytes <= 2**40,
            "storage.snapshot_limit_bytes",
            self.snapshot_limit_bytes,
            "1 KiB to 1 TiB",
        )
        week_s = 7 * 86400
        fits = 0 <= self.sweep_s <= week_s
        require(fits, "storage.sweep_s", self.sweep_s, f"0 (never) to {week_s} seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpSection:
    """The router's door."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes any free port."""
    replica_port: int = 0
    """Of each replica's own socket: fixed where a pod runs one replica; 0 takes any free port."""
    max_message_bytes: int = 64 * 1024
    """Largest request body or socket message accepted from a client."""

    def __post_init__(self) -> None:
        require(bool(self.host), "http.host", self.host, "name an address")
        for name in ("port", "replica_port"):
            value = getattr(self, name)
            require(0 <= value <= 65535, f"http.{name}", value, "0 to 65535")
        require(
            1024 <= self.max_message_bytes <= 2**26,
            "http.max_message_bytes",
            self.max_message_bytes,
            "1 KiB to 64 MiB",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitsSection:
    """What one request may ask for."""

    prompt_chars: int = 2000
    label_count: int = 16
    label_chars: int = 128
    sessions: int = 1000
    events_per_session: int = 10_000
    viewers_per_session: int = 256
    sessions_per_replica: int = 16
    """An upper bound beside measured capacity."""
    clip_bytes: int = 16 * 2**20
    """Largest clip that a session may be opened with."""
    clip_seconds: int = 15
    """What lies beyond is cut off."""
    clip_side: int = 4096
    """Largest width or height of such a clip."""

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            require(1 <= value <= 10**9, f"limits.{name}", value, "1 to 1000000000")


@dataclass(frozen=True, kw_only=True, slots=True)
class EchoConfig:
    """The whole configuration of one service."""

    model: ModelSection = field(default_factory=ModelSection)
    session: SessionSection = field(default_factory=SessionSection)
    storage: StorageSection = field(default_factory=StorageSection)
    http: HttpSection = field(default_factory=HttpSection)
    limits: LimitsSection = field(default_factory=LimitsSection)
    access: AccessSection = field(default_factory=AccessSection)
    telemetry: TelemetrySection = field(default_factory=TelemetrySection)


def from_mapping(cls: type[T], data: object, path: str = "") -> T:
    """Build the dataclass `cls` from plain data, refusing unknown keys and wrong types.

    Raises `ConfigError` with the full path of the key, and the nearest known key if there is one.
    """
    where = path or "config"
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected a mapping, got {type(data).__name__}", param=where)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in data.items():
        at = f"{path}.{key}" if path else str(key)
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), n=1)
            hint = f" (did you mean {near[0]}?)" if near else f" (known: {', '.join(known)})"
            raise ConfigError(f"{at}: unknown{hint}", param=at)
        values[key] = _convert(hints[key], value, at)
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            at = f"{path}.{name}" if path else name
            raise ConfigError(f"{at}: missing; give it a value", param=at)
    return cls(**values)


def _convert(hint: Any, value: object, at: str) -> Any:
    if is_dataclass(hint):
        return from_mapping(hint, value, at)  # type: ignore[arg-type]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None and type(None) in args:
            return None
        inner = [a for a in args if a is not type(None)]
        return _convert(_member(inner, value, at), value, at)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ConfigError(f"{at}: expected a list, got {value!r}", param=at)
        item = args[0]
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise ConfigError(f"{at}: expected {len(args)} values, got {value!r}", param=at)
        return tuple(_convert(item, v, f"{at}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str) and _EXPONENT.fullmatch(value):
        number = float(value)
        if math.isfinite(number):
            return number
    exact = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if not exact:
        raise ConfigError(
            f"{at}: expected {hint.__name__}, got {value!r} ({type(value).__name__})", param=at
        )
    return value


def _member(members: Sequence[Any], value: object, at: str) -> Any:
    """Which of several dataclasses a mapping is: the one whose `kind` it names."""
    if len(members) == 1:
        return members[0]
    kinds = {str(next(f.default for f in fields(m) if f.name == "kind")): m for m in members}
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if kind not in kinds:
        raise ConfigError(f"{at}.kind: {kind!r} is not one of {', '.join(kinds)}", param=at)
    return kinds[kind]


def with_overrides(data: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b=c` assignments (values read as YAML scalars) to plain configuration data."""
    result = _copied(data)
    for assignment in assignments:
        key, sep, text = assignment.partition("=")
        if not sep or not key:
            raise ConfigError(f"--set {assignment!r}: write it as section.key=value")
        *parents, last = key.strip().split(".")
        node = result
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{key}: {parent} is a value, not a section", param=key)
            node = child
        try:
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise ConfigError(f"{key}: {text!r} is not a value: {e}", param=key) from e
    return result


def _copied(data: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with all that are in it, so that no change reaches the one given."""
    return {k: _copied(v) if isinstance(v, Mapping) else v for k, v in data.items()}


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML mapping, or say what is wrong with the file."""
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{file}: cannot be read: {e.strerror or e}", param=str(file)) from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{file}: not YAML: {e}", param=str(file)) from e
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: expected a mapping at the top, got {type(data).__name__}")
    return data
