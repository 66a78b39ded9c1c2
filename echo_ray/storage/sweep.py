"""Deleting the blobs that nobody needs: the errand round the rule in `session/sweep.py`."""

from __future__ import annotations

from collections.abc import Mapping

from echo_ray.errors import SessionNotFound
from echo_ray.session.sweep import Grace, Named, StoredBlob, to_sweep
from echo_ray.storage.interface import Directory, SweptStore


def sweep(
    directory: Directory, tiers: Mapping[str, SweptStore], now: float, grace: Grace
) -> dict[str, list[StoredBlob]]:
    """Delete what may go from each tier and return it; `now` is wall time.

    `tiers` must be all the stores that hold blobs of this directory's sessions. Several processes
    may sweep at once. Raises what the stores raise; what was not deleted then is so the next time.
    """
    # The blobs first: a reference that is written meanwhile is seen with its blob, or with none.
    listed = {tier: list(store.list_blobs()) for tier, store in tiers.items()}
    holding = {blob.session_id for blobs in listed.values() for blob in blobs}
    sessions = {}
    for record in directory.list():
        clip = None if record.clip is None else record.clip.id
        ids = _named_snapshots(directory, record.id) if record.id in holding else ()
        if ids is not None:
            sessions[record.id] = Named(snapshots=ids, clip=clip)
    doomed = to_sweep(sessions, listed, now, grace)
    for tier, blobs in doomed.items():
        for blob in blobs:
            tiers[tier].delete(blob.session_id, blob.snapshot_id)
    return doomed


def _named_snapshots(directory: Directory, session_id: str) -> tuple[str, ...] | None:
    try:
        return tuple(ref.id for ref in directory.snapshots(session_id))
    except SessionNotFound:
        # Deleted since it was listed.
        return None
