"""The real service as a process of its own, for tests: Ray, two replicas, a router, SQLite."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil
from ports import free_port

from echo_ray.client import EchoClient, Segment
from echo_ray.config import LimitsSection, ModelSection
from echo_ray.engine.build import build_engine
from echo_ray.engine.engine import EchoEngine
from echo_ray.engine.upload import read_clip

COMMAND = "import sys; from echo_ray.cli import main; sys.exit(main())"
START_LIMIT_S = 90.0
STOP_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Service:
    """A running service: where it is, where it keeps its data, what it said."""

    url: str
    folder: Path
    log: Path
    process: subprocess.Popen[bytes]


@contextmanager
def running_service(folder: Path, **settings: object) -> Iterator[Service]:
    """Start `echo-ray serve`, wait for two replicas, and end all of it at the end."""
    port, log = free_port(), folder / "service.log"
    options = {"http.port": port, "storage.path": folder / "store", **settings}
    arguments = [part for k, v in options.items() for part in ("--set", f"{k}={v}")]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "serve", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    service = Service(f"http://127.0.0.1:{port}", folder, log, process)
    try:
        asyncio.run(wait_for_replicas(service, 2))
        yield service
    except BaseException:
        end(process)
        raise
    assert end(process) == 0
    # Ray's own lines about processes that died may stand anywhere between ours.
    said = log.read_text().splitlines()
    assert said[0] == "starting ..."
    assert any(line.startswith(f"echo_ray serves at {service.url} ") for line in said)
    assert "stopped" in said


def end(process: subprocess.Popen[bytes]) -> int:
    """SIGTERM, then SIGKILL for it and for every descendant that is still there."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in psutil.wait_procs(family, timeout=5)[1]:
        child.kill()
    return process.returncode


async def wait_for_replicas(service: Service, count: int) -> list[str]:
    """Ids of the live replicas once there are `count`; one that was killed is listed a while."""
    limit = time.monotonic() + START_LIMIT_S
    async with EchoClient(service.url) as client:
        while time.monotonic() < limit:
            if service.process.poll() is not None:
                break
            if "serves at" in service.log.read_text() and await client.ready():
                replicas = [r["id"] for r in await client.replicas() if lives(r["pid"])]
                if len(replicas) >= count:
                    return replicas
            await asyncio.sleep(0.1)
    raise AssertionError(f"no {count} replicas; the log: {service.log.read_text()[-3000:]}")


def lives(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def owner_pid(client: EchoClient, session_id: str) -> tuple[str, int]:
    """Id and process of the session's owner, once it has one that lives."""
    limit = time.monotonic() + START_LIMIT_S
    while time.monotonic() < limit:
        session = await client.get(session_id)
        for replica in await client.replicas():
            if replica["id"] == session["owner"] and lives(replica["pid"]):
                return replica["id"], replica["pid"]
        await asyncio.sleep(0.05)
    raise AssertionError(f"nobody owns {session_id} within {START_LIMIT_S:g} s")


async def take(client: EchoClient, session_id: str, start: int, count: int) -> list[Segment]:
    """The next `count` segments from `start` on, as any viewer gets them."""
    taken = []
    stream = client.segments(session_id, start=start, format="raw")
    async with aclosing(stream):
        async for segment in stream:
            taken.append(segment)
            if len(taken) == count:
                break
    return taken


@lru_cache(maxsize=1)
def lone_engine() -> EchoEngine:
    return build_engine(ModelSection())


def undisturbed(
    prompt: str, seed: int, count: int, switches: Mapping[int, str], *, clip: bytes | None = None
) -> list[str]:
    """Digests of a run that nothing ever happens to, by the engine alone."""
    engine = lone_engine()
    frames = b"" if clip is None else read_clip(clip, engine.shape, LimitsSection())
    state = engine.open(prompt, seed, frames)
    return [engine.step(state, [switches[i]] if i in switches else []).digest for i in range(count)]


def resume_process(pid: int) -> None:
    """SIGCONT, if the process is still there."""
    if psutil.pid_exists(pid):
        os.kill(pid, signal.SIGCONT)


def router_pid(service: Service) -> int:
    """The process that listens on the service's port."""
    port = int(service.url.rsplit(":", 1)[1])
    for process in psutil.Process(service.process.pid).children(recursive=True):
        for connection in process.net_connections("tcp"):
            if connection.status == "LISTEN" and connection.laddr.port == port:
                return process.pid
    raise AssertionError(f"nobody listens on {port}")
