"""A paused session as the router rig's stores hold it, and its archive."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
from router_rig import Rig
from stored import new, ref

from echo_ray.session.archive import Archive, pieces
from echo_ray.session.forking import Past
from echo_ray.session.records import SessionRecord, SessionState
from echo_ray.session.snapshot import Snapshot
from echo_ray.session.snapshot import encode as encode_snapshot

BLOB = encode_snapshot(Snapshot("fake/1/cpu", {}, {}))
OTHER = encode_snapshot(Snapshot("fake/2/cpu", {}, {}))
BINARY = {"Content-Type": "application/octet-stream"}
LIMIT = 2**30


def planted(rig: Rig, session_id: str = "s1", end: int = 30, **changes: Any) -> SessionRecord:
    """A paused session of `end` chunks with a snapshot of chunk 24."""
    record = new(
        session_id, model="fake", next_index=end, sealed=end, fingerprint="fake/1/cpu", **changes
    )
    record = replace(record, state=changes.get("state", SessionState.PAUSED))
    rig.directory.restore(Past(record=record, snapshots=[ref("p24", 24, session=session_id)]))
    rig.snapshots.put(session_id, "p24", BLOB)
    return record


def file_of(archive: Archive) -> bytes:
    return b"".join(pieces(archive)[1])


ARCHIVE = Archive(
    record=new(model="fake", next_index=30, sealed=30, fingerprint="fake/1/cpu"),
    point=24,
    snapshot=BLOB,
)


def refusal(answer: httpx.Response, status: int, code: str, *words: str) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    assert all(word in error["message"] for word in words), error


def only(rig: Rig, *ids: str) -> bool:
    """Whether these are all the sessions, and nobody else has blobs."""
    stored = {id_ for id_, blobs in rig.snapshots._blobs.items() if blobs}
    return {r.id for r in rig.directory.list()} == set(ids) and stored <= set(ids)


async def imported(rig: Rig, data: bytes, **more: Any) -> httpx.Response:
    url = rig.url("/v1/sessions/import")
    return await rig.http.post(url, content=data, **{"headers": BINARY, **more})
