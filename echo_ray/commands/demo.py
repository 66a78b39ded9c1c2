"""`echo-ray demo`: two live streams, a prompt switch, a kill -9, and nothing lost.

Starts the real service on this machine, watches it through the public API, kills the process that
generates one of the streams, and compares every segment with an undisturbed run of the same seed
and controls made by the engine alone.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echo_ray.client import EchoClient

HELP = "show a stream that outlives the process that produces it"

PROMPTS = {
    "first": "a red ball bouncing on a blue background",
    "second": "a green square moving on a black background",
}
SWITCHED = "a yellow triangle moving on a blue background"
SEED = 20260604
CHUNKS = 36
SWITCH_AFTER = 8
KILL_AFTER = 17
BUFFER_S = 2.0
START_LIMIT_S = 90.0
STREAM_LIMIT_S = 90.0


@dataclass(slots=True)
class Viewing:
    """What one viewer received, as it came."""

    name: str
    session_id: str
    arrivals: list[float] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    frames: list[bytes] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    owners: list[str] = field(default_factory=list)
    switched_at: int | None = None
    killed_at: float | None = None
    killed_after: int | None = None
    snapshot_bytes: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the results")
    parser.add_argument("--port", type=int, default=0, help="port of the service; 0: any free one")


def run(args: argparse.Namespace) -> int:
    """0 if every promise held, 1 if any broke."""
    from echo_ray.commands.demo_report import report

    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="echo-ray-demo-") as folder,
        _service(Path(folder), args.port or _free_port(), args.out / "service.log") as url,
    ):
        print(f"service at {url} after {time.monotonic() - started:.0f} s", flush=True)
        viewings = asyncio.run(asyncio.wait_for(_watch(url), STREAM_LIMIT_S))
    return report(viewings, args.out)


@contextmanager
def _service(folder: Path, port: int, log: Path) -> Iterator[str]:
    """`echo-ray serve` as a process of its own, ended with SIGTERM, then SIGKILL."""
    command = [
        sys.executable,
        "-c",
        "import sys; from echo_ray.cli import main; sys.exit(main())",
        "serve",
        "--set",
        f"http.port={port}",
        "--set",
        f"storage.path={folder}",
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            asyncio.run(_until_ready(f"http://127.0.0.1:{port}", process, log))
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def _until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    from echo_ray.client import EchoClient
    from echo_ray.errors import UnavailableError

    limit = time.monotonic() + START_LIMIT_S
    async with EchoClient(url) as client:
        while not await _two_replicas(client):
            if process.poll() is not None or time.monotonic() > limit:
                raise UnavailableError(f"the service did not start; its log is {log}")
            await asyncio.sleep(0.2)


async def _two_replicas(client: EchoClient) -> bool:
    return await client.ready() and len(await client.replicas()) >= 2


async def _watch(url: str) -> list[Viewing]:
    """Both viewers at once; the first one's session is switched, and its owner killed."""
    from echo_ray.client import EchoClient

    async with EchoClient(url) as client:
        viewings = []
        for number, (name, prompt) in enumerate(PROMPTS.items()):
            session = await client.create(prompt, seed=SEED + number)
            viewings.append(Viewing(name, session["id"]))
        await asyncio.gather(
            _view(client, viewings[0], disturb=True), _view(client, viewings[1], disturb=False)
        )
        for viewing in viewings:
            snapshots = await client.snapshots(viewing.session_id)
            viewing.snapshot_bytes = snapshots[0]["bytes"] if snapshots else 0
            await client.delete(viewing.session_id)
    return viewings


async def _view(client: EchoClient, viewing: Viewing, *, disturb: bool) -> None:
    async for segment in client.segments(viewing.session_id, start=0, format="raw"):
        viewing.arrivals.append(time.monotonic())
        viewing.indices.append(segment.index)
        viewing.digests.append(segment.metadata.digest)
        viewing.frames.append(segment.data)
        viewing.prompts.append(segment.metadata.prompt)
        viewing.owners.append(segment.metadata.owner or "?")
        if disturb and segment.index == SWITCH_AFTER:
            viewing.switched_at = await client.send_event(viewing.session_id, SWITCHED)
            print(f'chunk {segment.index}: switch to "{SWITCHED}"', end=", ")
            print(f"acknowledged for chunk {viewing.switched_at}", flush=True)
        if disturb and segment.index == KILL_AFTER:
            await _kill_owner(client, viewing)
        if len(viewing.indices) >= CHUNKS:
            return


async def _kill_owner(client: EchoClient, viewing: Viewing) -> None:
    session: dict[str, Any] = await client.get(viewing.session_id)
    owner = next(r for r in await client.replicas() if r["id"] == session["owner"])
    os.kill(owner["pid"], signal.SIGKILL)
    viewing.killed_at = time.monotonic()
    viewing.killed_after = viewing.indices[-1]
    print(
        f"chunk {viewing.killed_after}: kill -9 {owner['pid']}, the owner {owner['id']}", flush=True
    )


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
