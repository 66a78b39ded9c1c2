"""What a Redis server did, by its own accounts: commands, bytes, processor time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from redis_server import RedisProcess

from echo_ray.storage.redis_directory import RedisDirectory
from echo_ray.storage.redis_link import Command, RedisLink, RedisServer


@dataclass(slots=True)
class Cost:
    """What something took of the server."""

    commands: float = 0.0
    """Those inside scripts too."""
    bytes_in: float = 0.0
    bytes_out: float = 0.0
    cpu_s: float = 0.0

    def __sub__(self, other: Cost) -> Cost:
        return self + other * -1

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.commands + other.commands,
            self.bytes_in + other.bytes_in,
            self.bytes_out + other.bytes_out,
            self.cpu_s + other.cpu_s,
        )

    def __mul__(self, times: float) -> Cost:
        return Cost(
            self.commands * times, self.bytes_in * times, self.bytes_out * times, self.cpu_s * times
        )


class Meter:
    """The server's own accounts."""

    def __init__(self, server: RedisProcess) -> None:
        self._link = RedisLink(RedisServer(url=server.url, timeout_s=10))

    def read(self) -> Cost:
        (reply,) = self._link.run(("INFO", "everything"))
        lines = (line.partition(":") for line in reply.decode().splitlines())
        values = {name: value for name, _, value in lines}
        calls = sum(
            float(value.split("=")[1].split(",")[0])
            for name, value in values.items()
            if name.startswith("cmdstat_") and name != "cmdstat_info"
        )
        cpu_s = float(values["used_cpu_user"]) + float(values["used_cpu_sys"])
        bytes_in = float(values["total_net_input_bytes"])
        return Cost(calls, bytes_in, float(values["total_net_output_bytes"]), cpu_s)

    def of(self, work: Callable[[], object]) -> Cost:
        before = self.read()
        work()
        return self.read() - before


def say(text: str = "") -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def row(name: str, cost: Cost) -> None:
    say(
        f"  {name:<44} {cost.commands:8.1f} {cost.bytes_in:10,.0f} {cost.bytes_out:10,.0f} "
        f"{cost.cpu_s * 1e6:10,.0f}"
    )


def head(title: str) -> None:
    say(f"\n{title:<46} {'commands':>8} {'B in':>10} {'B out':>10} {'cpu us':>10}")


def batched(
    directory: RedisDirectory,
    meter: Meter,
    call: Callable[[], object],
    *,
    at_once: int,
    rounds: int,
) -> Cost:
    """The cost of one call where the server finds `at_once` of them waiting, as under load.

    Its commands are written down once and then sent many times over; it must bear that.
    """
    link = directory._link
    run, stages = link.run, []

    def noted(*commands: Command, **named: Any) -> list[Any]:
        stages.append(commands)
        return run(*commands, **named)

    link.run = noted  # type: ignore[method-assign]
    try:
        call()
    finally:
        link.run = run  # type: ignore[method-assign]
    return meter.of(lambda: _replay(link, stages, at_once, rounds)) * (1 / at_once / rounds)


def _replay(
    link: RedisLink, stages: Sequence[Sequence[Command]], at_once: int, rounds: int
) -> None:
    for _ in range(rounds):
        for commands in stages:
            link.run(*(list(commands) * at_once))
