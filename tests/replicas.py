"""Generator replicas in this process, with real sockets and threads, for tests of `serve/`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fakes import FakeEngine, undisturbed
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosedError

from echo_ray.clock import Clock, SystemClock
from echo_ray.config import EchoConfig, from_mapping
from echo_ray.serve.replica import Generator
from echo_ray.session.records import OnIdle, Pace, SessionRecord
from echo_ray.storage.memory import MemoryDirectory, MemorySnapshots

# Renewals and beats are quick; what runs out by itself does not on a machine that has other work.
QUICK = {
    "session": {
        "lease_ttl_s": 30.0,
        "lease_renew_s": 0.1,
        "beat_s": 0.05,
        "silence_s": 10.0,
        "idle_grace_s": 30.0,
        "retention_chunks": 64,
    },
}


LIMIT_S = 40.0
"""For what takes milliseconds on a machine that has nothing else to do."""


class Replicas:
    """Some replicas over one directory and one snapshot store."""

    def __init__(self, *, clock: Clock | None = None, **session: Any) -> None:
        self.config = from_mapping(EchoConfig, {"session": {**QUICK["session"], **session}})
        self.clock = clock or SystemClock()
        self.directory = MemoryDirectory(self.clock)
        self.snapshots = MemorySnapshots(2**20)
        self._running: list[Generator] = []
        self.engines: dict[str, FakeEngine] = {}

    def start(self, name: str, engine: FakeEngine | None = None, **parts: Any) -> Generator:
        """A running replica; `parts` replaces its directory or store."""
        made = engine or FakeEngine()
        self.engines[name] = made
        generator = Generator(
            self.config,
            replica_id=name,
            node_id="node",
            ip="127.0.0.1",
            build_engine=lambda _: made,
            directory=parts.get("directory", lambda: self.directory),
            store=parts.get("store", self.snapshots),
            clock=parts.get("clock", self.clock),
        )
        generator.start()
        self._running.append(generator)
        return generator

    def session(
        self,
        session_id: str = "s1",
        *,
        prompt: str = "a red circle",
        seed: int = 7,
        pace: Pace = Pace.MAX,
        on_idle: OnIdle = OnIdle.PAUSE,
    ) -> SessionRecord:
        record = SessionRecord(
            id=session_id, model="echo-tiny", prompt=prompt, seed=seed, pace=pace, on_idle=on_idle
        )
        self.directory.create(record)
        return record

    def claim(self, generator: Generator, session_id: str = "s1") -> int:
        """Make the replica the owner, as a router would; returns the epoch."""
        epoch = self.directory.get(session_id).epoch
        lease = self.directory.claim(
            session_id, generator.host.replica_id, expect_epoch=epoch, ttl_s=60.0
        )
        return lease.epoch

    def idle(self, generator: Generator, grace_s: float = 0.0) -> None:
        """From now on the replica lets sessions go that nobody has watched for so long."""
        generator.host._keeper._grace_s = grace_s

    def crash(self, generator: Generator) -> None:
        """The replica goes without a word."""
        generator.abandon()
        self._running.remove(generator)

    def __enter__(self) -> Replicas:
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self.engines.values():
            engine.may_step.set()
        for generator in self._running:
            generator.abandon()


class PullEnd:
    """The router's end of a pull."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.others: list[dict[str, Any]] = []

    async def want(self, until: int) -> None:
        await self.socket.send(json.dumps({"type": "want", "until": until}))

    async def message(self) -> dict[str, Any]:
        """The next text message that is no beat."""
        while True:
            text = await self.socket.recv()
            assert isinstance(text, str)
            body: dict[str, Any] = json.loads(text)
            if body["type"] != "beat":
                return body

    async def chunk(self) -> tuple[dict[str, Any], bytes]:
        body = await self.message()
        assert body["type"] == "video.chunk_metadata", body
        data = await self.socket.recv()
        assert isinstance(data, bytes)
        return body, data

    async def chunks(self, count: int) -> list[dict[str, Any]]:
        """Metadata of the next `count` chunks."""
        return [(await self.chunk())[0] for _ in range(count)]


@asynccontextmanager
async def pull(
    generator: Generator,
    epoch: int,
    start: int = 0,
    *,
    session_id: str = "s1",
    fmt: str = "raw",
    want: int | None = None,
) -> AsyncIterator[PullEnd]:
    url = f"ws://{generator.address}/v1/pull/{session_id}?epoch={epoch}&from={start}&format={fmt}"
    async with asyncio.timeout(LIMIT_S), connect(url, compression=None) as socket:
        end = PullEnd(socket)
        if want is not None:
            await end.want(want)
        yield end


async def hello(end: PullEnd) -> dict[str, Any]:
    body = await end.message()
    assert body["type"] == "hello", body
    return body


async def watch(
    generator: Generator, epoch: int, start: int, count: int, want: int | None = None
) -> list[dict[str, Any]]:
    """Metadata of `count` chunks from `start` on, pulled and read to the end."""
    async with pull(generator, epoch, start, want=want or start + count) as end:
        await hello(end)
        return await end.chunks(count)


def digests(heads: list[dict[str, Any]]) -> list[str]:
    return [head["digest"] for head in heads]


def truth(
    count: int, point_every: int = 4, switches: dict[int, list[str]] | None = None
) -> list[str]:
    """Digests of the session that `Replicas.session` makes, when nothing goes wrong."""
    engine = FakeEngine(point_every=point_every)
    return undisturbed(engine, "a red circle", 7, count, switches or {})


class Unreliable:
    """A store in front of another whose methods fail when told; counts its calls."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.failures: dict[str, list[Exception | None]] = {}
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*args: Any, **options: Any) -> Any:
            self.calls.append(name)
            waiting = self.failures.get(name)
            error = waiting.pop(0) if waiting else None
            if error is not None:
                raise error
            return found(*args, **options)

        return call


async def close_code(end: PullEnd) -> int | None:
    """Read until the replica closes; returns its close code. Messages are kept in `others`."""
    with suppress(ConnectionClosedError):
        async for text in end.socket:
            if isinstance(text, str) and json.loads(text)["type"] != "beat":
                end.others.append(json.loads(text))
    return end.socket.close_code


def eventually(condition: Callable[[], bool], timeout_s: float = LIMIT_S) -> bool:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
