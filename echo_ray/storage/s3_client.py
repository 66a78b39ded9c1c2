"""From plain settings to a connection to S3; refuses settings that cannot be."""

from __future__ import annotations

import base64
import hashlib
import logging
import re
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from echo_ray.errors import ConfigError

ENCRYPTIONS = ("none", "AES256", "aws:kms")
MIN_PART_BYTES = 5 * 2**20
MAX_OBJECT_BYTES = 5 * 2**30
"""The most that one request may carry; a larger blob needs parts."""
MAX_PARTS = 10_000
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


def connect(
    *,
    endpoint: str | None,
    region: str | None,
    path_style: bool,
    profile: str | None,
    threads: int,
    timeout_s: float,
) -> Any:
    """A client that sends every request once; nothing is sent here. Raises `ConfigError`."""
    # At the debug level botocore logs answers whole, those that hold credentials among them.
    log = logging.getLogger("botocore")
    log.setLevel(max(log.level, logging.INFO))
    config = Config(
        connect_timeout=timeout_s / 3,
        read_timeout=timeout_s / 3,
        retries={"mode": "standard", "total_max_attempts": 1},
        max_pool_connections=threads,
        s3={"addressing_style": "path" if path_style else "auto"},
        # Checksums are given by us; those that botocore would add, many servers refuse.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        session = boto3.Session(profile_name=profile)
        client = session.client("s3", region_name=region, endpoint_url=endpoint, config=config)
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(
            f"no connection to S3 can be made of region {region!r}, endpoint {endpoint!r} and "
            f"profile {profile!r}: {error}"
        ) from error
    client.meta.events.register("before-call.s3.DeleteObjects", _add_md5)
    return client


def encryption_arguments(encryption: str, kms_key_id: str | None) -> dict[str, Any]:
    """The arguments that ask for it at every new object. Raises `ConfigError`."""
    if encryption not in ENCRYPTIONS:
        raise ConfigError(
            f"encryption {encryption!r} is unknown: use {', '.join(ENCRYPTIONS)}",
            param="encryption",
        )
    if kms_key_id is not None and encryption != "aws:kms":
        raise ConfigError(
            f"kms_key_id {kms_key_id!r} goes with encryption 'aws:kms', not {encryption!r}",
            param="kms_key_id",
        )
    if encryption == "none":
        return {}
    key = {} if kms_key_id is None else {"SSEKMSKeyId": kms_key_id}
    return {"ServerSideEncryption": encryption, **key}


def check_place(bucket: str, prefix: str, endpoint: str | None) -> None:
    """Refuse names that cannot be. Raises `ConfigError`."""
    if _BUCKET.fullmatch(bucket) is None:
        raise ConfigError(
            f"bucket {bucket!r} is no bucket name: 3 to 63 small letters, digits, dots and dashes",
            param="bucket",
        )
    if len(prefix) > 256 or _PREFIX.fullmatch(prefix) is None:
        raise ConfigError(
            f"prefix {prefix!r} is not allowed: up to 256 letters, digits, dots, dashes, "
            "underscores, with single slashes between",
            param="prefix",
        )
    if endpoint is None:
        return
    parts = urlsplit(endpoint)
    if "@" in parts.netloc:
        # The value is not repeated: it holds a password.
        raise ConfigError(
            "endpoint holds credentials; leave them out and give them in the environment or a "
            "profile",
            param="endpoint",
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise ConfigError(
            f"endpoint {endpoint!r} is no address: use http(s)://HOST:PORT", param="endpoint"
        )


def check_sizes(
    *,
    limit_bytes: int,
    multipart_threshold_bytes: int,
    part_bytes: int,
    threads: int,
    timeout_s: float,
) -> None:
    """Refuse sizes that S3 refuses, and times and threads that make no sense."""
    _require(
        "multipart_threshold_bytes",
        multipart_threshold_bytes,
        1 <= multipart_threshold_bytes <= MAX_OBJECT_BYTES,
        f"1 to {MAX_OBJECT_BYTES}",
    )
    _require(
        "part_bytes",
        part_bytes,
        MIN_PART_BYTES <= part_bytes <= MAX_OBJECT_BYTES,
        f"{MIN_PART_BYTES} to {MAX_OBJECT_BYTES}",
    )
    _require(
        "limit_bytes",
        limit_bytes,
        1 <= limit_bytes <= part_bytes * MAX_PARTS,
        f"1 to {MAX_PARTS} parts of part_bytes, {part_bytes * MAX_PARTS}",
    )
    _require("threads", threads, 1 <= threads <= 256, "1 to 256")
    _require("timeout_s", timeout_s, 0.1 <= timeout_s <= 3600, "0.1 to 3600 s")


def _require(name: str, value: float, allowed: bool, limits: str) -> None:
    if not allowed:
        raise ConfigError(f"{name} is {value}; it must lie in {limits}", param=name)


def _add_md5(params: dict[str, Any], **_: object) -> None:
    # MinIO, Ceph and others insist on it for this one request; botocore sends a CRC instead.
    digest = hashlib.md5(params["body"], usedforsecurity=False).digest()
    params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()
