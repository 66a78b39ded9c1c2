"""What a replica tells Serve for the scaling of replicas: a mapping of names to numbers, and back.

figures(standing, demand) -> numbers
read(id, numbers) -> (standing, demand)
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import asdict, fields

from echo_ray.session.capacity import slots
from echo_ray.session.demand import Demand
from echo_ray.session.draining import Reason
from echo_ray.session.fingerprint import ResumePolicy, model_of
from echo_ray.session.records import ReplicaRecord
from echo_ray.session.scaling import Leaving, Standing

TOLD = "told"
"""1 if a router told this replica of its demand of late, else 0."""


def standing(
    record: ReplicaRecord,
    *,
    leaving: Reason | None,
    policy: ResumePolicy,
    slack_s: float,
    chunk_s: float,
    lead_chunks: int,
    limit: int,
) -> Standing:
    """A replica as the scaling sees it; `leaving`: why it drains, if it does."""
    fingerprint = record.fingerprint
    alike = fingerprint if policy is ResumePolicy.EXACT else model_of(fingerprint)
    gone = {None: Leaving.NO, Reason.ADMIN: Leaving.KEPT}
    return Standing(
        id=record.id,
        sessions=len(record.sessions),
        slots=slots(chunk_seconds=record.chunk_seconds, chunk_s=chunk_s, limit=limit),
        # Without end if nobody waits for anything.
        slack_chunks=min(slack_s / chunk_s, float(lead_chunks)),
        leaving=gone.get(leaving, Leaving.REPLACED),
        kind=zlib.crc32(alike.encode()),
    )


def figures(standing: Standing, demand: Demand | None) -> dict[str, float]:
    """The numbers that say so."""
    said = asdict(standing)
    del said["id"]
    told = asdict(demand or Demand()) | {TOLD: demand is not None}
    return {name: float(value) for name, value in (said | told).items()}


def read(replica_id: str, numbers: Mapping[str, float]) -> tuple[Standing, Demand | None]:
    """What numbers say. Raises `KeyError` for one that is missing, `ValueError` for nonsense."""
    standing = Standing(
        id=replica_id,
        sessions=int(numbers["sessions"]),
        slots=int(numbers["slots"]),
        slack_chunks=numbers["slack_chunks"],
        leaving=Leaving(int(numbers["leaving"])),
        kind=int(numbers["kind"]),
    )
    demand = Demand(**{f.name: int(numbers[f.name]) for f in fields(Demand)})
    return standing, demand if numbers[TOLD] else None
