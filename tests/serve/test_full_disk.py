"""The disk fills up under a running service, and is freed again."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from service import running_service, undisturbed

from echo_ray.client import EchoClient
from echo_ray.errors import NoReplica, StoreFull

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(180)]

PROMPT = "a red ball on a blue background"
FULL_AT = 9
FULL_FOR_S = 5.0
COUNT = 24


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of three megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(file: Path) -> None:
    handle = os.open(file, os.O_CREAT | os.O_WRONLY)
    try:
        while True:
            os.write(handle, bytes(4096))
    except OSError:
        assert file.stat().st_size > 2**20
    finally:
        os.close(handle)


async def watch(url: str, ballast: Path) -> list[str]:
    """Watch a stream over a full disk; meanwhile a new session must be refused plainly."""
    async with EchoClient(url) as client:
        session = (await client.create(PROMPT, seed=12, pace="max"))["id"]

        async def free() -> None:
            await asyncio.sleep(FULL_FOR_S)
            with pytest.raises((StoreFull, NoReplica)):
                await client.create(PROMPT)
            await asyncio.to_thread(ballast.unlink)

        seen: list[str] = []
        stream = client.segments(session, start=0)
        async with aclosing(stream):
            async for segment in stream:
                seen.append(segment.metadata.digest)
                if segment.index == FULL_AT:
                    fill(ballast)
                    freeing = asyncio.create_task(free())
                if len(seen) == COUNT:
                    break
        await freeing
        return seen


def test_streams_wait_for_room_and_go_on_exactly(tmp_path: Path, small_disk: Path) -> None:
    with running_service(tmp_path, **{"storage.path": small_disk / "store"}) as service:
        seen = asyncio.run(watch(service.url, small_disk / "ballast"))
    assert seen == undisturbed(PROMPT, 12, COUNT, {})
