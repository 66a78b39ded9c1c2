"""Which blobs of the snapshot stores nobody needs any more.

A blob is written before its reference, and a clip before its session, so what nothing names may
only be too young to be named. Of a session's pasts (`restoring.py`) the newest is needed. And a
directory that lost everything knows no session: nothing is deleted then, for the blobs are what the
sessions can be brought back from.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

PAST_ID = re.compile(r"past-e(\d{1,16})-n(\d{1,16})-l(\d{1,16})-t(\d{1,16})")
"""Of the blobs that hold a session's past: epoch, next index, entries, time; in this order they
say which is newer."""


def pasts(ids: Iterable[str]) -> list[str]:
    """Those of the ids that are of pasts, the newest first."""
    found = [match for match in map(PAST_ID.fullmatch, ids) if match]
    found.sort(key=lambda match: [int(part) for part in match.groups()], reverse=True)
    return [match[0] for match in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBlob:
    """One blob as a snapshot store lists it."""

    session_id: str
    snapshot_id: str
    size_bytes: int
    stored_at: float
    """Wall time of the last write, by the store's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """The blobs of one session that the directory names."""

    snapshots: Collection[str]
    """Ids of its snapshot references, pinned or not."""
    clip: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grace:
    """How long after its last write a blob is safe, in seconds."""

    unnamed_s: float = 3600.0
    """Of a known session: far longer than any writer takes from a blob to its reference."""
    unknown_s: float = 7 * 86400.0
    """Of a session that the directory does not know: the time to restore a lost directory."""


def to_sweep(
    sessions: Mapping[str, Named],
    tiers: Mapping[str, Iterable[StoredBlob]],
    now: float,
    grace: Grace,
) -> dict[str, list[StoredBlob]]:
    """Blobs to delete, by tier; `sessions` are all that the directory knows.

    Kept are: every blob that is named; every one within its grace; the newest past of each session;
    of a session that has none of its named snapshots left in any tier, the newest other one; and
    everything if no session is known at all.
    """
    if not sessions:
        return {tier: [] for tier in tiers}
    listed = {tier: list(blobs) for tier, blobs in tiers.items()}
    by_session: defaultdict[str, list[StoredBlob]] = defaultdict(list)
    for blobs in listed.values():
        for blob in blobs:
            by_session[blob.session_id].append(blob)
    doomed = {
        (session_id, snapshot_id)
        for session_id, blobs in by_session.items()
        for snapshot_id in _doomed(sessions.get(session_id), blobs, now, grace)
    }
    return {
        tier: [blob for blob in blobs if (blob.session_id, blob.snapshot_id) in doomed]
        for tier, blobs in listed.items()
    }


def _doomed(
    named: Named | None, blobs: Collection[StoredBlob], now: float, grace: Grace
) -> set[str]:
    """Ids of one session's blobs that may go from every tier."""
    newest_write: dict[str, float] = {}
    for blob in blobs:
        earlier = newest_write.get(blob.snapshot_id, blob.stored_at)
        newest_write[blob.snapshot_id] = max(earlier, blob.stored_at)
    if named is None:
        # As a whole: a session that is being brought back gets its blobs one after the other.
        over = now - max(newest_write.values()) > grace.unknown_s
        return set(newest_write) if over else set()
    past_ids = pasts(newest_write)
    unnamed = newest_write.keys() - set(named.snapshots) - {named.clip} - set(past_ids)
    if unnamed and not newest_write.keys() & set(named.snapshots):
        unnamed.discard(max(unnamed, key=lambda id_: (newest_write[id_], id_)))
    unneeded = unnamed | set(past_ids[1:])
    return {id_ for id_ in unneeded if now - newest_write[id_] > grace.unnamed_s}
