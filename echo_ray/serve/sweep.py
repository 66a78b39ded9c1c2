"""The slow sweep: sessions that go on without viewers get a new owner when theirs is gone."""

from __future__ import annotations

import asyncio
import logging
import random

from echo_ray.errors import EchoError
from echo_ray.serve.front import Front
from echo_ray.serve.telemetry import log
from echo_ray.session.records import OnIdle, SessionRecord, SessionState


def orphans(records: list[SessionRecord], watched: set[str], now: float) -> list[SessionRecord]:
    """Sessions to adopt: begun, live, going on without viewers, and their lease has run out.

    `watched` sessions have an upstream here, which looks after them quicker.
    """
    return [
        r
        for r in records
        if r.state is SessionState.LIVE
        and r.on_idle is OnIdle.CONTINUE
        and r.epoch > 0
        and r.lease_until <= now
        and r.id not in watched
    ]


async def sweep_once(front: Front) -> int:
    """Adopt every orphan; returns how many found an owner."""
    records = await front.all_sessions()
    adopted = 0
    for record in orphans(records, front.relays.sessions(), front.clock.wall()):
        try:
            await front.adopt(record.id)
            adopted += 1
        except EchoError as e:
            log(logging.WARNING, "orphan_not_adopted", session=record.id, reason=e.message)
    return adopted


async def sweep_forever(front: Front, rng: random.Random) -> None:
    """Sweep every `session.sweep_s`, a little out of step with the other routers."""
    while True:
        await asyncio.sleep(front.config.session.sweep_s * rng.uniform(0.75, 1.25))
        try:
            await sweep_once(front)
        except EchoError as e:
            log(logging.WARNING, "sweep_failed", reason=e.message)
