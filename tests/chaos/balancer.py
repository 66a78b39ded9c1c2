"""A TCP balancer in front of the routers, as any deployment of several has one.

It asks every door for `/healthz`, sends connections to doors that answer, and cuts those of a door
that no longer does (HAProxy's `on-marked-down shutdown-sessions`). Knows nothing about HTTP beyond.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

Address = tuple[str, int]
CHECK_EVERY_S = 0.3
CHECK_TIMEOUT_S = 0.5
FAILS = 2
"""Checks in a row that a door fails before it is down; a refused one is down at once."""
PIECE = 2**16


@dataclass
class Door:
    """One address that may be a router's."""

    address: Address
    up: bool = False
    fails: int = 0
    connections: set[asyncio.StreamWriter] = field(default_factory=set)


class Balancer:
    """Listens on a loopback port; `doors` says where routers may be, and may block."""

    def __init__(self, doors: Callable[[], Iterable[Address]]) -> None:
        self._find = doors
        self._doors: dict[Address, Door] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=PIECE)
        self.port = self._server.sockets[0].getsockname()[1]
        self._keep(self._look())

    def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()

    @property
    def up(self) -> list[Address]:
        return [door.address for door in self._doors.values() if door.up]

    @property
    def busiest(self) -> Address | None:
        """The door with the most connections that answers."""
        up = [door for door in self._doors.values() if door.up]
        return max(up, key=lambda d: len(d.connections)).address if up else None

    async def _look(self) -> None:
        while True:
            found = set(await asyncio.to_thread(lambda: list(self._find())))
            for address in found - set(self._doors):
                self._doors[address] = Door(address)
                self._keep(self._check(self._doors[address]))
            for address in set(self._doors) - found:
                self._cut(self._doors.pop(address))
            await asyncio.sleep(CHECK_EVERY_S)

    async def _check(self, door: Door) -> None:
        while self._doors.get(door.address) is door:
            try:
                async with asyncio.timeout(CHECK_TIMEOUT_S):
                    healthy = await _healthy(door.address)
            except TimeoutError:
                healthy = False
            except OSError:
                healthy, door.fails = False, FAILS
            door.fails = 0 if healthy else door.fails + 1
            if healthy:
                door.up = True
            elif door.fails >= FAILS:
                self._cut(door)
            await asyncio.sleep(CHECK_EVERY_S)

    def _cut(self, door: Door) -> None:
        door.up = False
        for writer in door.connections:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._relay(reader, writer)
        except asyncio.CancelledError:
            # The balancer closes; asyncio's own callback cannot bear a cancelled task.
            pass
        finally:
            writer.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for door in sorted(self._doors.values(), key=lambda d: len(d.connections)):
            if not door.up:
                continue
            try:
                async with asyncio.timeout(CHECK_TIMEOUT_S):
                    there, back = await asyncio.open_connection(*door.address, limit=PIECE)
            except OSError:
                continue
            door.connections |= {writer, back}
            try:
                await _carry(reader, writer, there, back)
            finally:
                door.connections -= {writer, back}
                back.close()
            return

    def _keep(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _healthy(address: Address) -> bool:
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: chaos\r\nConnection: close\r\n\r\n")
        return (await reader.readline()).startswith(b"HTTP/1.1 200")
    finally:
        writer.transport.abort()


async def _carry(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    there: asyncio.StreamReader,
    back: asyncio.StreamWriter,
) -> None:
    """Until either side ends."""
    ways = [asyncio.create_task(_pump(reader, back)), asyncio.create_task(_pump(there, writer))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await source.read(PIECE):
            target.write(piece)
            await target.drain()
