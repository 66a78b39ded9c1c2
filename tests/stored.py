"""Records as tests of the stores make them."""

from __future__ import annotations

from dataclasses import replace

from echo_ray.session.records import (
    Lease,
    SessionRecord,
    SnapshotRef,
)
from echo_ray.storage.interface import Directory


def new(id_: str = "s1", **changes: object) -> SessionRecord:
    record = SessionRecord(id=id_, model="echo-tiny", prompt="a red ball", seed=7)
    return replace(record, **changes)  # type: ignore[arg-type]


def ref(id_: str = "p8", chunk: int = 8, session: str = "s1", **changes: object) -> SnapshotRef:
    made = SnapshotRef(
        id=id_,
        session_id=session,
        chunk_index=chunk,
        size_bytes=21,
        digest="d",
        created_at=1.5,
        store="local",
        epoch=1,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def owned(directory: Directory, id_: str = "s1") -> Lease:
    directory.create(new(id_))
    return directory.claim(id_, "r1", expect_epoch=0, ttl_s=1.5)


def produce(directory: Directory, lease: Lease, *indices: int) -> None:
    for n in indices:
        directory.seal(lease, n)
        directory.commit(lease, n, f"digest-{n}", "fp")
