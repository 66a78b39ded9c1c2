"""Which blobs of the snapshot stores nobody needs any more.

A blob is written before its reference, and a clip before its session, so what has no reference may
only be too young to have one. And a directory that lost everything knows no session: nothing is
deleted then, for the blobs are what the sessions can be brought back from.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBlob:
    """One blob as a snapshot store lists it."""

    session_id: str
    snapshot_id: str
    size_bytes: int
    stored_at: float
    """Wall time of the last write, by the store's clock."""
