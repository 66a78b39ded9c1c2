"""Which ids may name a snapshot blob, and how large a blob may be."""

from __future__ import annotations

import re

from echo_ray.errors import CapacityError, InvalidRequestError

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_ids(session_id: str, snapshot_id: str | None = None) -> None:
    """Refuse ids that could leave the folder or the bucket. Raises `InvalidRequestError`."""
    for name, value in (("session_id", session_id), ("snapshot_id", snapshot_id)):
        if value is not None and _ID.fullmatch(value) is None:
            raise InvalidRequestError(
                f"{name} {value[:200]!r} is not allowed: 1 to 128 letters, digits, dots, dashes "
                "and underscores, beginning with a letter or digit",
                param=name,
            )


def check_size(snapshot_id: str, size_bytes: int, limit_bytes: int) -> None:
    """Refuse a blob over the limit. Raises `CapacityError`."""
    if size_bytes > limit_bytes:
        raise CapacityError(
            f"snapshot {snapshot_id!r} has {size_bytes} bytes, the limit is {limit_bytes}; raise "
            "storage.snapshot_limit_bytes",
            param="storage.snapshot_limit_bytes",
        )
