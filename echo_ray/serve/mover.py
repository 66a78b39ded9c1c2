"""Moves sessions away from replicas that are to go away; every router does, all of them alike.

A replica that drains says so in its record and serves on. Each router that sees it plans a move for
each of its sessions: those that it has viewers of at once, the others a little later, for a router
with viewers can tell them. Of several that try, one claim holds; the others find it made.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping
from functools import partial

from echo_ray import wire
from echo_ray.errors import CapacityError, ConflictError, EchoError, NoReplica, NotFoundError
from echo_ray.serve.front import Front
from echo_ray.serve.migration import migrate, tell_owner
from echo_ray.serve.telemetry import log
from echo_ray.session.records import SessionState

LOOK_S = 0.5
AT_ONCE = 4
"""So many sessions catch up at a time, for they share what their targets have to spare."""
YIELD_S = 1.0
"""How much later, at most, a router moves a session that it has no viewers of."""


class Mover:
    """The moves of one router; run it as a task."""

    def __init__(self, front: Front, rng: random.Random) -> None:
        self._front = front
        self._rng = rng
        self._seats = asyncio.Semaphore(AT_ONCE)
        self._moves: dict[str, asyncio.Task[None]] = {}
        self._homeless: dict[str, EchoError] = {}
        """Sessions that nobody had room for, and why."""

    async def run(self) -> None:
        """Look for replicas that drain, for ever."""
        try:
            while True:
                await asyncio.sleep(LOOK_S)
                try:
                    await self.look()
                except EchoError as e:
                    log(logging.WARNING, "drains_unknown", reason=e.message)
        finally:
            for move in tuple(self._moves.values()):
                move.cancel()

    async def look(self) -> None:
        """Begin the moves that are due."""
        draining = await asyncio.to_thread(self._front.directory.draining)
        leaving = {session_id: r.id for r in draining for session_id in r.sessions}
        for session_id, source in leaving.items():
            if session_id not in self._moves:
                move = asyncio.create_task(self._move(session_id, source))
                self._moves[session_id] = move
                move.add_done_callback(partial(self._ended, session_id))
        await self._tell_parked(leaving)

    def _ended(self, session_id: str, _: asyncio.Task[None]) -> None:
        del self._moves[session_id]

    async def _move(self, session_id: str, source: str) -> None:
        if not self._front.relays.of(session_id):
            await asyncio.sleep(self._rng.uniform(0, YIELD_S))
        async with self._seats:
            try:
                record = await self._front.get(session_id)
                if record.owner == source:
                    await migrate(self._front, session_id)
                else:
                    tell_owner(self._front, record)
            except (ConflictError, NotFoundError):
                # Moved by another router, paused, closed or deleted meanwhile.
                return
            except (NoReplica, CapacityError) as e:
                self._homeless[session_id] = e
            except Exception as e:
                # The next look tries again.
                log(
                    logging.WARNING, "move_failed", session=session_id, source=source, reason=str(e)
                )

    async def _tell_parked(self, leaving: Mapping[str, str]) -> None:
        """Viewers whose session found no room before its replica went hear what they wait for."""
        for session_id in [sid for sid in self._homeless if sid not in leaving]:
            error = self._homeless.pop(session_id)
            try:
                record = await self._front.get(session_id)
            except NotFoundError:
                continue
            if record.state is SessionState.LIVE and not self._front.owners.is_owned(record):
                log(logging.WARNING, "parked", session=session_id, reason=error.message)
                self._front.relays.tell(session_id, wire.error_message(error))
