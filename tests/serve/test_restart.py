"""Services that go down and come back: all of one, and its router."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from service import Service, router_pid, running_service, take, undisturbed

from echo_ray.client import EchoClient

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]

PROMPT = "a red ball on a blue background"


@pytest.fixture
def own_service(tmp_path: Path) -> Iterator[Service]:
    """One that a test may break."""
    with running_service(tmp_path) as running:
        yield running


def test_everything_restarts_and_the_stream_goes_on(tmp_path: Path) -> None:
    async def begin(url: str) -> tuple[str, list[str]]:
        async with EchoClient(url) as client:
            session = (await client.create(PROMPT, seed=7, pace="max"))["id"]
            return session, [s.metadata.digest for s in await take(client, session, 0, 13)]

    async def go_on(url: str, session: str) -> list[str]:
        async with EchoClient(url) as client:
            return [s.metadata.digest for s in await take(client, session, 13, 8)]

    with running_service(tmp_path) as first:
        session, digests = asyncio.run(begin(first.url))
    with running_service(tmp_path) as second:
        digests += asyncio.run(go_on(second.url, session))
    assert digests == undisturbed(PROMPT, 7, 21, {})
    with sqlite3.connect(tmp_path / "store" / "directory.sqlite3") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


def test_a_killed_router_is_replaced_and_clients_go_on(own_service: Service) -> None:
    async def scenario() -> None:
        async with EchoClient(own_service.url) as client:
            session = (await client.create(PROMPT, seed=8))["id"]
            seen = []
            stream = client.segments(session, start=0, format="raw")
            async with aclosing(stream):
                async for segment in stream:
                    seen.append(segment.metadata.digest)
                    if segment.index == 5:
                        os.kill(router_pid(own_service), signal.SIGKILL)
                    if len(seen) == 16:
                        break
            assert seen == undisturbed(PROMPT, 8, 16, {})

    started = time.monotonic()
    asyncio.run(scenario())
    assert time.monotonic() - started < 60
