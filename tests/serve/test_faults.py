"""Faults on the real thing: real Ray, real processes, real signals, viewers comparing digests."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import httpx
import pytest
from browser import CHROMIUM, Browser
from service import (
    Service,
    lives,
    owner_pid,
    resume_process,
    running_service,
    take,
    undisturbed,
    wait_for_replicas,
)
from uploads import mp4

from echo_ray.client import EchoClient

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PROMPT = "a red ball on a blue background"
OTHER = "a green square on a black background"
COUNT = 20
METRICS = (
    "echo_ray_chunk_latency_seconds",
    "echo_ray_frames_generated_total",
    "echo_ray_frames_per_second",
    "echo_ray_chunk_realtime_factor_ratio",
    "echo_ray_time_to_first_chunk_seconds",
    "echo_ray_sessions",
    "echo_ray_drift_score",
    "echo_ray_snapshot_duration_seconds",
    "echo_ray_snapshot_size_bytes",
    "echo_ray_resume_duration_seconds",
    "echo_ray_failovers_total",
)
Disturbance = Callable[[EchoClient, str, int], Awaitable[None]]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    # A lease that no pause of a busy machine outlasts: owners change for the faults of the tests.
    settings = {"session.lease_ttl_s": 20.0, "session.silence_s": 3.0}
    with running_service(tmp_path_factory.mktemp("service"), **settings) as running:
        yield running


async def watch(
    service: Service, seed: int, disturb: Disturbance, *, pace: str = "realtime", viewers: int = 2
) -> dict[int, str]:
    """Watch one session through a disturbance; returns the switches that were acknowledged.

    Every viewer must get every index once, in order, each digest equal to the undisturbed run's.
    """
    switches: dict[int, str] = {}
    async with EchoClient(service.url) as client:
        session = (await client.create(PROMPT, seed=seed, pace=pace))["id"]

        async def view(number: int) -> list[tuple[int, str]]:
            seen = []
            stream = client.segments(session, start=0, format="raw")
            async with aclosing(stream):
                async for segment in stream:
                    seen.append((segment.index, segment.metadata.digest))
                    assert not segment.metadata.discontinuity
                    if number == 0 and segment.index == 3:
                        switches[await client.send_event(session, OTHER)] = OTHER
                    if number == 0:
                        await disturb(client, session, segment.index)
                    if len(seen) == COUNT:
                        break
            return seen

        everybody = await asyncio.gather(*(view(n) for n in range(viewers)))
        await client.delete(session)
    expected = list(enumerate(undisturbed(PROMPT, seed, COUNT, switches)))
    for seen in everybody:
        assert seen == expected
    assert len(switches) == 1
    return switches


def test_kill_9_of_the_owner_loses_nothing(service: Service) -> None:
    killed: list[int] = []

    async def kill(client: EchoClient, session: str, index: int) -> None:
        if index == 11:
            _, pid = await owner_pid(client, session)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    asyncio.run(watch(service, 1, kill))
    assert len(killed) == 1
    asyncio.run(wait_for_replicas(service, 2))


def test_kill_9_of_both_replicas_in_turn_loses_nothing(service: Service) -> None:
    killed: list[int] = []

    async def kill(client: EchoClient, session: str, index: int) -> None:
        if index in (6, 15):
            _, pid = await owner_pid(client, session)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    asyncio.run(watch(service, 2, kill, pace="max"))
    assert len(set(killed)) == 2
    asyncio.run(wait_for_replicas(service, 2))


def test_a_stopped_owner_that_wakes_up_is_fenced_and_writes_nothing(service: Service) -> None:
    stopped: list[tuple[str, int]] = []
    rows: dict[str, object] = {}

    async def stop(client: EchoClient, session: str, index: int) -> None:
        if index == 9:
            stopped.append(await owner_pid(client, session))
            os.kill(stopped[0][1], signal.SIGSTOP)
        elif index == 12:
            # What it had made before it was stopped may reach this far.
            for _ in range(600):
                if (await client.get(session))["owner"] != stopped[0][0]:
                    break
                await asyncio.sleep(0.1)
            else:
                pytest.fail("a stopped owner was not replaced")
            resume_process(stopped[0][1])
        elif index == 17:
            rows.update(await client.get(session))

    try:
        asyncio.run(watch(service, 3, stop))
    finally:
        for _, pid in stopped:
            resume_process(pid)
    assert rows["owner"] != stopped[0][0]
    # A replica that an earlier test killed may be listed for a lease still, and be tried first.
    assert isinstance(rows["epoch"], int)
    assert rows["epoch"] >= 2
    asyncio.run(wait_for_replicas(service, 2))


def test_a_planned_migration_is_seamless(service: Service) -> None:
    owners: list[str] = []

    async def move(client: EchoClient, session: str, index: int) -> None:
        if index in (7, 13):
            owners.append((await owner_pid(client, session))[0])
            await client.migrate(session)
        elif index == COUNT - 1:
            owners.append((await owner_pid(client, session))[0])

    asyncio.run(watch(service, 4, move))
    assert owners[0] != owners[1] != owners[2]


def test_a_viewer_that_comes_back_goes_on_where_it_was(service: Service) -> None:
    async def scenario() -> None:
        async with EchoClient(service.url) as client:
            session = (await client.create(PROMPT, seed=5))["id"]
            first = await take(client, session, 0, 5)
            await asyncio.sleep(0.5)
            again = await take(client, session, 3, 6)
            assert [s.index for s in again] == list(range(3, 9))
            assert [s.data for s in again[:2]] == [s.data for s in first[3:]]
            expected = undisturbed(PROMPT, 5, 9, {})
            assert [s.metadata.digest for s in first[:3] + again] == expected
            await client.delete(session)

    asyncio.run(scenario())


def test_a_clip_survives_kill_9_before_the_first_point(service: Service) -> None:
    clip = mp4(32)

    async def scenario() -> None:
        async with EchoClient(service.url) as client:
            # In real time: the first point is seconds away, however slowly this viewer reads.
            made = await client.create(PROMPT, seed=8, clip=clip)
            assert made["clip_frames"] == 21
            session, seen = made["id"], []
            stream = client.segments(session, start=0, format="raw")
            async with aclosing(stream):
                async for segment in stream:
                    seen.append(segment.metadata.digest)
                    if segment.index == 0:
                        _, pid = await owner_pid(client, session)
                        os.kill(pid, signal.SIGKILL)
                        assert await client.snapshots(session) == []
                    if len(seen) == 10:
                        break
            assert seen == undisturbed(PROMPT, 8, 10, {}, clip=clip)
            assert seen[:3] != undisturbed(PROMPT, 8, 3, {})
            assert (await client.get(session))["epoch"] >= 2
            await client.delete(session)

    asyncio.run(scenario())
    asyncio.run(wait_for_replicas(service, 2))


def test_pause_costs_nothing_and_resume_is_exact(service: Service) -> None:
    async def scenario() -> None:
        async with EchoClient(service.url) as client:
            session = (await client.create(PROMPT, seed=6, pace="max"))["id"]
            first = await take(client, session, 0, 10)
            paused = await client.pause(session)
            assert (paused["state"], paused["owner"]) == ("paused", None)
            made = paused["next_chunk"]
            await asyncio.sleep(1.0)
            assert (await client.get(session))["next_chunk"] == made
            more = await take(client, session, 10, 8)
            digests = [s.metadata.digest for s in first + more]
            assert digests == undisturbed(PROMPT, 6, 18, {})
            await client.delete(session)

    asyncio.run(scenario())


def test_metrics_tell_what_happened(service: Service) -> None:
    replicas = httpx.get(f"{service.url}/v1/admin/replicas").json()["replicas"]
    alive = [r["address"] for r in replicas if lives(r["pid"])]
    assert alive
    pages = [httpx.get(f"http://{address}/metrics", timeout=20).text for address in alive]
    pages.append(httpx.get(f"{service.url}/metrics").text)
    text = "\n".join(pages)
    for name in METRICS:
        assert f"# TYPE {name} " in text
    sessions = httpx.get(f"{service.url}/v1/sessions").json()["sessions"]
    assert not [s["id"] for s in sessions if s["id"] in text]


def test_the_readme_s_program_runs(service: Service) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert "http://127.0.0.1:8000" in program
    ran = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-c",
            program.replace("http://127.0.0.1:8000", service.url),
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = [line.split() for line in ran.stdout.splitlines()]
    digests = undisturbed(PROMPT, 7, 11, {})
    assert [(int(n), d) for n, d, _ in lines] == [(n, d[:12]) for n, d in enumerate(digests)]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_shows_a_stream_across_its_owner_s_death(
    service: Service, tmp_path_factory: pytest.TempPathFactory
) -> None:
    page = Browser(tmp_path_factory.mktemp("profile"))
    try:
        page.open(service.url)
        page.fill("prompt", PROMPT)
        page.click("#start-form button")
        page.wait_for("Number(document.getElementById('received').textContent) >= 6", limit_s=60)
        replicas = httpx.get(f"{service.url}/v1/admin/replicas").json()["replicas"]
        owner = page.text("owner")
        os.kill(next(r["pid"] for r in replicas if r["id"] == owner), signal.SIGKILL)
        page.wait_for(f"document.getElementById('owner').textContent != '{owner}'", limit_s=60)
        page.fill("switch", OTHER)
        page.click("#switch-form button")
        page.wait_for(f"document.getElementById('effect').textContent == '{OTHER}'", limit_s=60)
        page.wait_for("document.getElementById('video').currentTime > 8", limit_s=60)
        page.screenshot(service.folder / "page.png")
        assert page.text("handovers") == "1"
        assert page.text("reconnects") == "0"
        assert page.complaints == []
    finally:
        page.close()
    asyncio.run(wait_for_replicas(service, 2))
