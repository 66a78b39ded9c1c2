"""A router's part after Redis lost everything: it brings the sessions back from S3.

Every router looks, and every router that finds the directory lost does it; `storage/restore.py`
says why that does no harm.
"""

from __future__ import annotations

import asyncio
import logging
import random

from echo_ray.errors import EchoError
from echo_ray.serve.front import Front
from echo_ray.serve.telemetry import log
from echo_ray.storage.open import open_restorer
from echo_ray.storage.restore import Report, Restorer

LOOK_S = 1.0
_EARLIEST, _LATEST = 0.75, 1.25


async def restore_forever(front: Front, rng: random.Random) -> None:
    """Look every second whether the directory was lost, and fill it again if so."""
    restorer: Restorer | None = None
    try:
        while True:
            try:
                if restorer is None:
                    restorer = await asyncio.to_thread(
                        open_restorer, front.config.storage, front.clock
                    )
                if restorer is None:
                    # Nothing outlives the directory here.
                    await asyncio.Event().wait()
                elif await asyncio.to_thread(restorer.lost):
                    _tell(front, await asyncio.to_thread(restorer.restore_all))
            except EchoError as e:
                front.telemetry.count("store_errors", op="restore")
                log(logging.WARNING, "restore_failed", reason=e.message)
            await asyncio.sleep(LOOK_S * rng.uniform(_EARLIEST, _LATEST))
    finally:
        if restorer is not None:
            restorer.close()


def _tell(front: Front, report: Report) -> None:
    front.telemetry.count("sessions_restored", len(report.brought_back), outcome="ok")
    front.telemetry.count("sessions_restored", len(report.refused), outcome="refused")
    for session_id, error in report.refused.items():
        log(logging.ERROR, "session_not_restored", session=session_id, reason=error.message)
    found = (report.brought_back, report.there, report.refused)
    log(
        logging.WARNING if any(found) else logging.INFO,
        "directory_restored",
        brought_back=len(report.brought_back),
        there=len(report.there),
        refused=len(report.refused),
    )
