"""Services that go down and come back: all of one, and its router."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from contextlib import aclosing
from pathlib import Path

import pytest
from service import Service, router_pid, running_service, take, undisturbed

from echo_ray.client import EchoClient

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]

PROMPT = "a red ball on a blue background"


async def begin(service: Service) -> tuple[str, list[str]]:
    """Watch a new session, killing the router on the way."""
    async with EchoClient(service.url) as client:
        session = (await client.create(PROMPT, seed=7, pace="max"))["id"]
        seen = []
        stream = client.segments(session, start=0, format="raw")
        async with aclosing(stream):
            async for segment in stream:
                seen.append(segment.metadata.digest)
                if segment.index == 5:
                    os.kill(router_pid(service), signal.SIGKILL)
                if len(seen) == 13:
                    break
        return session, seen


async def go_on(service: Service, session: str) -> list[str]:
    async with EchoClient(service.url) as client:
        return [s.metadata.digest for s in await take(client, session, 13, 8)]


def test_a_killed_router_and_a_restart_of_everything_change_nothing(tmp_path: Path) -> None:
    with running_service(tmp_path) as first:
        session, digests = asyncio.run(begin(first))
    with running_service(tmp_path) as second:
        digests += asyncio.run(go_on(second, session))
    assert digests == undisturbed(PROMPT, 7, 21, {})
    with sqlite3.connect(tmp_path / "store" / "directory.sqlite3") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
