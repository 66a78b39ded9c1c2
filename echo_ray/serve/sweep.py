"""The slow sweeps of a router: sessions whose owner is gone, and blobs that nobody needs."""

from __future__ import annotations

import asyncio
import logging
import random

from echo_ray.errors import EchoError
from echo_ray.serve.front import Front
from echo_ray.serve.telemetry import log
from echo_ray.serve.tier_accounts import TierAccounts
from echo_ray.session.sweep import Grace
from echo_ray.storage.sweep import sweep

# Routers sweep a little out of step with each other.
_EARLIEST, _LATEST = 0.75, 1.25


async def sweep_once(front: Front) -> int:
    """Adopt every orphan; returns how many found an owner.

    Those that are watched have an upstream here, which looks after them quicker.
    """
    adopted = left = 0
    for record in await front.orphans():
        if record.id in front.relays.sessions():
            continue
        left += 1
        try:
            await front.adopt(record.id)
            adopted += 1
        except EchoError as e:
            log(logging.WARNING, "orphan_not_adopted", session=record.id, reason=e.message)
    front.homeless = left - adopted
    front.telemetry.set("sessions_waiting", front.homeless, watched="false")
    front.telemetry.set("sessions_waiting", len(front.relays.waiting()), watched="true")
    open_now = await asyncio.to_thread(front.directory.count_open)
    front.telemetry.set("sessions_open", open_now)
    return adopted


async def sweep_forever(front: Front, rng: random.Random) -> None:
    """Adopt orphans every `session.sweep_s`, and tell how the snapshot store stands."""
    tiers = TierAccounts(front.snapshots, front.telemetry)
    while True:
        await asyncio.sleep(front.config.session.sweep_s * rng.uniform(_EARLIEST, _LATEST))
        tiers.tell()
        try:
            await sweep_once(front)
        except EchoError as e:
            log(logging.WARNING, "sweep_failed", reason=e.message)


async def sweep_blobs_forever(front: Front, rng: random.Random) -> None:
    """Delete the blobs that nobody needs every `storage.sweep_s`; 0: never."""
    every_s = front.config.storage.sweep_s
    while True:
        if not every_s:
            await asyncio.Event().wait()
        await asyncio.sleep(every_s * rng.uniform(_EARLIEST, _LATEST))
        try:
            await asyncio.to_thread(_sweep_blobs, front)
        except Exception as e:
            # The next one finds what this one left; streams need none of it.
            front.telemetry.count("store_errors", op="sweep")
            log(logging.WARNING, "blob_sweep_failed", failure=e)


def _sweep_blobs(front: Front) -> None:
    now = front.clock.wall()
    for tier, blobs in sweep(front.directory, front.snapshots.tiers, now, Grace()).items():
        if blobs:
            size_bytes = sum(b.size_bytes for b in blobs)
            log(logging.INFO, "blobs_swept", tier=tier, count=len(blobs), size_bytes=size_bytes)
