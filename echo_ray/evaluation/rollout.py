"""Driving an engine through a case, and reading its chunks back.

Shapes: N frames, H W pixels.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from echo_ray.engine.frames import pixels
from echo_ray.errors import InvalidRequestError
from echo_ray.evaluation.report import Report
from echo_ray.evaluation.statistics import heaviest, majority
from echo_ray.evaluation.subject import Measured
from echo_ray.scenes.detector import Seen, detect
from echo_ray.session.chunk import Chunk

READ_FRAMES = 3
"""A chunk is read from its last frames, unless an instrument says otherwise."""
LEAST_CONFIDENCE = 0.3
"""Of an object's colour, from which on it counts. Objects of true frames have more than 0.45, also
where one hides another; what is below is a smear."""
MOST_CASES = 1_000_000

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much is measured, and from which seed."""

    cases: int
    seed: int = 0
    chunks: int = 400
    """Length of a drift stream."""
    constant_streams: int | None = None
    """Drift streams under one prompt; as many as cases, if not given."""
    switched_streams: int | None = None
    """Drift streams under changing prompts; likewise."""
    so_far: Callable[[Report], object] = field(default=lambda report: None, repr=False)
    """Takes what is measured so far, now and then, from instruments that run for hours."""

    def __post_init__(self) -> None:
        for name, value in (("cases", self.cases), ("chunks", self.chunks)):
            if not 1 <= value <= MOST_CASES:
                raise InvalidRequestError(f"--{name} {value}: give 1 to {MOST_CASES}", param=name)
        for name, count in (
            ("constant-streams", self.constant_streams),
            ("switched-streams", self.switched_streams),
        ):
            if count is not None and not 0 <= count <= MOST_CASES:
                raise InvalidRequestError(f"--{name} {count}: give 0 to {MOST_CASES}", param=name)
        if self.constant_streams == self.switched_streams == 0:
            raise InvalidRequestError(
                "--constant-streams 0 --switched-streams 0: give at least one stream",
                param="constant-streams",
            )
        if not 0 <= self.seed < 2**32:
            raise InvalidRequestError(f"--seed {self.seed}: give 0 to {2**32 - 1}", param="seed")


def case_rng(what: str, seed: int, index: int) -> np.random.Generator:
    """The randomness of one case: a function of these three alone, and never of training's."""
    return np.random.default_rng([seed, zlib.crc32(f"evaluation {what}".encode()), index])


def session_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def counted(what: str, items: Iterable[T], total: int, unit: str = "case") -> Iterator[T]:
    """The items, with a bar that says how far it is and how long it will take."""
    # A file keeps every state of the bar.
    often = 0.5 if sys.stderr.isatty() else 30.0
    yield from tqdm(items, desc=what, total=total, unit=unit, mininterval=often, dynamic_ncols=True)


def roll(
    engine: Measured,
    prompts: Mapping[int, str],
    seed: int,
    chunks: int,
    first_frames: bytes = b"",
) -> Iterator[Chunk]:
    """Chunks of a session; `prompts` by the chunk from which each one holds, the first at 0."""
    state = engine.open(prompts[0], seed, first_frames)
    for index in range(chunks):
        switched = [prompts[index]] if index and index in prompts else []
        yield engine.step(state, switched)


def tail(chunk: Chunk, frames: int = READ_FRAMES) -> NDArray[np.uint8]:
    """A chunk's last frames [N, H, W, 3]."""
    return pixels(chunk)[-frames:]


def look(frames: NDArray[np.uint8]) -> list[Seen]:
    """What frames [N, H, W, 3] show, for every instrument alike: without what is but a smear."""
    return [
        replace(
            seen, objects=tuple(o for o in seen.objects if o.colour_confidence >= LEAST_CONFIDENCE)
        )
        for seen in detect(frames)
    ]


def read(chunks: Iterable[Chunk], frames: int = READ_FRAMES) -> list[Seen]:
    """What the last frames of each chunk show, one after the other."""
    return look(np.concatenate([tail(chunk, frames) for chunk in chunks]))


@dataclass(frozen=True, slots=True)
class Reading:
    """What several frames show together, each attribute by a vote of its own."""

    background: str | None
    count: int
    colour: str | None
    """Of the object, weighted by area if there are several; None without one in most frames."""
    shape: str | None
    size: str | None
    things: tuple[tuple[str, str], ...]
    """(colour, shape) of each object, in the alphabet's order; the most frequent such set."""
    confidence: float
    """Mean of the objects' confidence over the frames that show any; 0 if none does."""

    @property
    def empty(self) -> bool:
        return self.count == 0


def vote(seen: Sequence[Seen]) -> Reading:
    """The reading that most frames give."""
    count = majority(str(len(s.objects)) for s in seen)
    objects = [o for s in seen for o in s.objects]
    with_any = [s for s in seen if s.objects]
    shown = 2 * len(with_any) > len(seen)
    sets = majority("|".join(sorted(f"{o.colour} {o.shape}" for o in s.objects)) for s in with_any)
    things = tuple((t.split()[0], t.split()[1]) for t in sets.split("|")) if sets else ()
    return Reading(
        background=majority(s.background for s in seen),
        count=int(count or 0),
        colour=heaviest((o.colour, o.radius**2) for o in objects) if shown else None,
        shape=heaviest((o.shape, o.radius**2) for o in objects) if shown else None,
        size=heaviest((o.size, o.radius**2) for o in objects) if shown else None,
        things=things if shown else (),
        confidence=_mean_confidence(with_any),
    )


def _mean_confidence(seen: Sequence[Seen]) -> float:
    values = [o.confidence for s in seen for o in s.objects]
    return sum(values) / len(values) if values else 0.0
