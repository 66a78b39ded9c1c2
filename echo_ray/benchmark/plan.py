"""How much of everything a run does, which stages it has, and what time each of them gets."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from echo_ray.clock import Clock
from echo_ray.errors import ConfigError, InvalidRequestError

STAGES = ("machine", "gate", "micro", "ladder", "decoders", "state", "streams", "profile")
_SHARES = (20.0, 120.0, 50.0, 150.0, 50.0, 60.0, 90.0, 60.0)
"""Seconds of ten minutes. What a stage leaves over is the next one's."""
MINUTES = (0.1, 120.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Counts of a run; the smaller ones are for a CPU, to see that every stage works."""

    gate_chunks: int = 8
    blocks: int = 2
    """How often baseline and rung take turns."""
    chunks: int = 4
    """Timed in each block."""
    repeats: int = 20
    """Timings of one small piece."""
    resumed_chunks: int = 10
    stream_seconds: float = 25.0
    streams: tuple[int, ...] = (1, 2, 3)
    decoded_chunks: int = 3


FULL = Plan()
DRY = Plan(
    gate_chunks=7, chunks=2, repeats=2, resumed_chunks=2, stream_seconds=2.0, streams=(1, 2, 3),
    decoded_chunks=1,
)  # fmt: skip


def chosen(stages: str) -> tuple[str, ...]:
    """The stages that a list with commas names, in their order; the gate is always one of them.

    Raises `InvalidRequestError`.
    """
    if stages == "all":
        return STAGES
    named = [name.strip() for name in stages.split(",")]
    for name in named:
        if name not in STAGES:
            raise InvalidRequestError(
                f"--stages: {name!r} is not a stage; name some of {', '.join(STAGES)}, or all",
                param="stages",
            )
    return tuple(name for name in STAGES if name in named or name == "gate")


def check_minutes(minutes: float) -> float:
    low, high = MINUTES
    if not low <= minutes <= high:
        raise ConfigError(f"--minutes {minutes:g}: give {low:g} to {high:g}", param="minutes")
    return minutes


class Budget:
    """The time of a run, shared out among its stages."""

    def __init__(self, minutes: float, stages: Collection[str], clock: Clock) -> None:
        self._clock = clock
        self._start_s = clock.monotonic()
        shares = {n: s for n, s in zip(STAGES, _SHARES, strict=True) if n in stages}
        self.scale = scale = 60 * minutes / sum(shares.values())
        """How much more time a stage has than in a whole run of ten minutes."""
        self._ends_s: dict[str, float] = {}
        passed = 0.0
        for name, share in shares.items():
            passed += scale * share
            self._ends_s[name] = passed

    def elapsed_s(self) -> float:
        return self._clock.monotonic() - self._start_s

    def left_s(self, stage: str) -> float:
        """Seconds until the stage's time is up; negative after it."""
        return self._ends_s[stage] - self.elapsed_s()

    def total_s(self) -> float:
        return max(self._ends_s.values())

    def refusal(self, stage: str, needed_s: float) -> str:
        """Why something that takes so long is left out; empty if it fits."""
        left = self.left_s(stage)
        if needed_s <= left:
            return ""
        return (
            f"takes about {needed_s:.0f} s, {max(0.0, left):.0f} s of the stage's time are left; "
            "give more --minutes or fewer --stages"
        )
