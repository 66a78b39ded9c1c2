"""A whole service in one process: routers and scripted replicas over one memory directory."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any

import httpx
from fake_replica import SHAPE, FakeReplica, frames
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from echo_ray.clock import SystemClock
from echo_ray.config import EchoConfig, HttpSection, LimitsSection, SessionSection
from echo_ray.serve.front import Front
from echo_ray.serve.router_service import RouterService
from echo_ray.serve.telemetry import BOTH, ROUTERS, Telemetry
from echo_ray.storage.memory import MemoryDirectory, MemorySnapshots

SECTION = SessionSection(
    lease_ttl_s=0.9,
    lease_renew_s=0.1,
    beat_s=0.05,
    silence_s=0.8,
    lead_chunks=2,
    retention_chunks=8,
    sweep_s=0.2,
)
LIMIT_S = 40.0
"""For what takes milliseconds on a machine that has nothing else to do."""
CONFIG = EchoConfig(
    session=SECTION,
    http=HttpSection(port=0, max_message_bytes=4096),
    limits=LimitsSection(prompt_chars=100, viewers_per_session=8),
)


class Rig:
    """Directory, replicas and routers that belong together."""

    def __init__(self, config: EchoConfig = CONFIG) -> None:
        self.config = config
        self.directory = MemoryDirectory(SystemClock())
        self.snapshots = MemorySnapshots(2**20)
        self.replicas: dict[str, FakeReplica] = {}
        self.routers: list[RouterService] = []
        self.viewers: list[Watch] = []
        self.http = httpx.AsyncClient(trust_env=False, timeout=LIMIT_S, verify=False)

    def replica(self, name: str, **script: Any) -> FakeReplica:
        fake = FakeReplica(name, self.directory, section=self.config.session, **script)
        self.replicas[name] = fake
        return fake

    def router(self, **config: Any) -> RouterService:
        rng = random.Random(len(self.routers))
        front = Front(
            config=replace(self.config, **config),
            shape=SHAPE,
            directory=self.directory,
            snapshots=self.snapshots,
            clock=SystemClock(),
            telemetry=Telemetry(ROUTERS + BOTH),
            rng=rng,
        )
        service = RouterService(front, rng)
        self.routers.append(service)
        return service

    def url(self, path: str, router: int = 0) -> str:
        return f"http://{self.routers[router].address}{path}"

    async def call(
        self, method: str, path: str, body: Any = None, *, router: int = 0, **more: Any
    ) -> httpx.Response:
        given = {"json": body} if body is not None else {}
        return await self.http.request(method, self.url(path, router), **given, **more)

    async def create(self, **fields: Any) -> str:
        wish = {"prompt": "red", "seed": 7, "pace": "max", **fields}
        answer = await self.call("POST", "/v1/sessions", wish)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def watch(
        self, session_id: str, query: str = "", *, router: int = 0, fmt: str = "raw"
    ) -> Watch:
        query = f"{query}&format={fmt}" if fmt else query
        address = self.routers[router].address
        return Watch(f"ws://{address}/v1/sessions/{session_id}/stream?{query.lstrip('&')}")

    async def open(self, session_id: str, query: str = "") -> Watch:
        """A viewer that stays until the rig is taken down."""
        viewer = await self.watch(session_id, query).__aenter__()
        self.viewers.append(viewer)
        return viewer

    def owner(self, session_id: str) -> FakeReplica:
        return self.replicas[self.directory.get(session_id).owner or ""]

    async def close(self) -> None:
        await self.http.aclose()
        for viewer in self.viewers:
            await viewer.__aexit__(None, None, None)
        parts = (*self.routers, *self.replicas.values())
        await asyncio.gather(*(part.stop() for part in parts))


class Watch:
    """A viewer that writes down everything it hears."""

    def __init__(self, url: str) -> None:
        self._connecting = connect(
            url, max_size=2**26, proxy=None, compression=None, close_timeout=0.1
        )
        self.messages: list[dict[str, Any]] = []
        self.segments: list[tuple[dict[str, Any], bytes]] = []
        self.socket: ClientConnection

    async def __aenter__(self) -> Watch:
        self.socket = await self._connecting.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._connecting.__aexit__(*error)

    @property
    def indices(self) -> list[int]:
        return [metadata["chunk_index"] for metadata, _ in self.segments]

    @property
    def types(self) -> list[str]:
        return [m["type"] for m in self.messages]

    async def send(self, message: dict[str, Any] | str | bytes) -> None:
        await self.socket.send(json.dumps(message) if isinstance(message, dict) else message)

    async def read(self) -> dict[str, Any]:
        """The next message; a segment's bytes are read with its metadata."""
        message: dict[str, Any] = json.loads(await asyncio.wait_for(self.socket.recv(), LIMIT_S))
        if message["type"] == "video.chunk_metadata":
            data = await asyncio.wait_for(self.socket.recv(), LIMIT_S)
            assert isinstance(data, bytes)
            assert len(data) == message["byte_length"]
            self.segments.append((message, data))
        else:
            self.messages.append(message)
        return message

    async def until_made_by(self, epoch: int) -> None:
        """Read up to and including the first chunk that is made under that epoch or a later one.

        What an earlier owner made may still be on its way when another one is there.
        """
        while not self.segments or self.segments[-1][0]["epoch"] < epoch:
            await self.read()

    async def until(self, index: int) -> None:
        """Read up to and including chunk `index`."""
        while not self.segments or self.indices[-1] < index:
            await self.read()

    async def until_type(self, kind: str) -> dict[str, Any]:
        while (message := await self.read())["type"] != kind:
            pass
        return message

    async def until_closed(self) -> int:
        """Read to the end; the close code."""
        try:
            while True:
                await self.read()
        except ConnectionClosed as e:
            return e.rcvd.code if e.rcvd else 1006

    def check(self, start: int, *, seed: int = 7, prompt: str = "red") -> None:
        """Every index once, in order, each as an undisturbed run makes it."""
        assert self.indices == list(range(start, start + len(self.segments)))
        for metadata, data in self.segments:
            assert data == frames(seed, metadata["chunk_index"], metadata["prompt"])
            assert metadata["prompt"] == prompt


async def eventually(condition: Callable[[], Any], timeout_s: float = LIMIT_S) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        await asyncio.sleep(0.01)


def run(
    test: Callable[[Rig], Awaitable[None]], config: EchoConfig = CONFIG, limit_s: float = 55.0
) -> None:
    """Run an async test with a rig that is taken down afterwards."""

    async def whole() -> None:
        rig = Rig(config)
        try:
            async with asyncio.timeout(limit_s):
                await test(rig)
        finally:
            await rig.close()

    body: Coroutine[Any, Any, None] = whole()
    asyncio.run(body)
