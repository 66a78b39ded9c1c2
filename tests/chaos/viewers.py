"""Sessions that are watched through everything, and what an engine alone makes of each.

A viewer is the project's own client, connecting again as any program would; a session is watched by
one or two, some of them switch prompts, and after a minute or two it ends and another one begins.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeVar

from echo_ray.client import EchoClient
from echo_ray.errors import EchoError, UnavailableError
from echo_ray.session.engine_port import Engine, StreamShape

T = TypeVar("T")
COLOURS = ("red", "green", "blue", "yellow", "white")
SHAPES = ("ball", "square", "triangle")
LIFE_S = (60.0, 120.0)
SWITCH_S = (4.0, 20.0)
LATE_S = 5.0
"""A second viewer begins at chunk 0 at most so long after the first."""
ASK_LIMIT_S = 90.0
END_LIMIT_S = 60.0
"""How long a viewer may take to come to the end that everybody else reached."""


@dataclass
class Viewing:
    """What one viewer received, as it came."""

    name: str
    indices: list[int] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    marked: list[int] = field(default_factory=list)
    """Segments that the service called a discontinuity."""
    broken: str | None = None
    """Why it could not go on."""

    @property
    def next(self) -> int:
        return len(self.indices)


@dataclass
class Show:
    """One session with its viewers."""

    session_id: str
    prompt: str
    seed: int
    viewings: list[Viewing] = field(default_factory=list)
    switches: dict[int, list[str]] = field(default_factory=dict)
    """Acknowledged prompts by the chunk where they take effect, in the order accepted."""
    last: int | None = None
    """The chunk to end after."""

    def truth(self, engine: Engine) -> list[str]:
        """Digests of a run that nothing ever happens to."""
        state = engine.open(self.prompt, self.seed)
        count = 1 + max((max(v.indices, default=-1) for v in self.viewings), default=-1)
        return [engine.step(state, self.switches.get(n, ())).digest for n in range(count)]


@dataclass
class Audience:
    """Keeps `sessions` shows running until told to end."""

    url: str
    rng: random.Random
    shape: StreamShape
    sessions: int
    shows: list[Show] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    _over: asyncio.Event = field(default_factory=asyncio.Event)
    _first: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    async def play(self) -> None:
        """Until `end`; every show that began is watched to its end."""
        await asyncio.gather(*(self._seat() for _ in range(self.sessions)))

    async def begun(self) -> None:
        """Returns when every session has shown its first segment."""
        for _ in range(self.sessions):
            await self._first.acquire()

    def end(self) -> None:
        """Every show is to end a few chunks from now."""
        self._over.set()

    async def _seat(self) -> None:
        async with EchoClient(self.url, timeout_s=5.0, patience_s=ASK_LIMIT_S) as client:
            while not self._over.is_set():
                await self._show(client)

    async def _show(self, client: EchoClient) -> None:
        rng = random.Random(self.rng.random())
        prompt, seed = _prompt(rng), rng.randrange(2**31)
        made = await self._insist("create", lambda: client.create(prompt, seed=seed))
        if made is None:
            return
        show = Show(made["id"], prompt, seed)
        self.shows.append(show)
        watching = [asyncio.create_task(self._watch(client, show, 0))]
        if rng.random() < 0.6:
            watching.append(asyncio.create_task(self._watch(client, show, rng.uniform(0, LATE_S))))
        switching = asyncio.create_task(self._switch(client, show, rng))
        try:
            async with asyncio.timeout(rng.uniform(*LIFE_S)):
                await self._over.wait()
        except TimeoutError:
            pass
        switching.cancel()
        show.last = max(v.next for v in show.viewings) + 3
        await asyncio.wait([switching, *watching], timeout=END_LIMIT_S)
        for task in watching:
            task.cancel()
        await asyncio.gather(switching, *watching, return_exceptions=True)
        await self._insist("delete", lambda: client.delete(show.session_id))

    async def _watch(self, client: EchoClient, show: Show, delay_s: float) -> None:
        viewing = Viewing(f"{show.session_id}/{len(show.viewings)}")
        show.viewings.append(viewing)
        await asyncio.sleep(delay_s)
        while show.last is None or viewing.next <= show.last:
            try:
                await self._read(client, show, viewing)
            except UnavailableError:
                await asyncio.sleep(0.5)
            except EchoError as e:
                if not e.retryable:
                    viewing.broken = f"{e.code}: {e.message}"
                    return
                await asyncio.sleep(e.retry_after_s or 0.5)

    async def _read(self, client: EchoClient, show: Show, viewing: Viewing) -> None:
        stream = client.segments(show.session_id, start=viewing.next, format="raw")
        async with aclosing(stream):
            async for segment in stream:
                viewing.arrivals.append(time.monotonic())
                if segment.index == 0 and show.viewings[0] is viewing:
                    self._first.release()
                viewing.indices.append(segment.index)
                viewing.digests.append(segment.metadata.digest)
                if segment.metadata.discontinuity:
                    viewing.marked.append(segment.index)
                if show.last is not None and segment.index >= show.last:
                    return
        viewing.broken = "the stream ended by itself"
        show.last = min(viewing.next, show.last or viewing.next)

    async def _switch(self, client: EchoClient, show: Show, rng: random.Random) -> None:
        if rng.random() < 0.3:
            return
        while True:
            await asyncio.sleep(rng.uniform(*SWITCH_S))
            prompt, event = _prompt(rng), secrets.token_hex(8)
            # Once sent it may count, whether the answer arrives or not, so it is seen to its end.
            await asyncio.shield(self._send(client, show, prompt, event))

    async def _send(self, client: EchoClient, show: Show, prompt: str, event: str) -> None:
        chunk = await self._insist(
            "send_event", lambda: client.send_event(show.session_id, prompt, event_id=event)
        )
        if chunk is not None:
            show.switches.setdefault(chunk, []).append(prompt)

    async def _insist(self, what: str, ask: Callable[[], Awaitable[T]]) -> T | None:
        """Ask until there is an answer, as the client's documentation says one should."""
        limit = time.monotonic() + ASK_LIMIT_S
        while True:
            try:
                return await ask()
            except EchoError as e:
                if not e.retryable or time.monotonic() > limit:
                    self.complaints.append(f"{what}: {e.code}: {e.message}")
                    return None
                await asyncio.sleep(e.retry_after_s or 0.3)


def _prompt(rng: random.Random) -> str:
    colour, background = rng.sample(COLOURS, 2)
    return f"a {colour} {rng.choice(SHAPES)} moving on a {background} background"
