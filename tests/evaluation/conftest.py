"""Models made of true frames: one that shows what it is told, and others with one fault each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from small import _modules, small_preset

from echo_ray.engine.frames import pixels
from echo_ray.evaluation.cases import (
    BACKGROUND_NAMES,
    COLOUR_NAMES,
    SHAPE_NAMES,
    SIZE_NAMES,
    SPEED_NAMES,
    Scene,
    Thing,
    as_bytes,
    as_script,
)
from echo_ray.evaluation.rollout import read, vote
from echo_ray.evaluation.subject import ModulesSubject
from echo_ray.evaluation.variants import Variant
from echo_ray.model.words import VOCABULARY, read_prompt
from echo_ray.preset import Preset, load_preset
from echo_ray.scenes.motion import animate
from echo_ray.session.chunk import Chunk, DriftReading, frames_digest
from echo_ray.session.engine_port import StreamShape, stream_shape
from echo_ray.session.snapshot import Snapshot

HORIZON = 12 * 48
"""Frames that an oracle's objects have a path for."""

Fault = Callable[[Scene, int], Scene]
"""(what was asked for, chunks since the session or the prompt began) -> what is shown."""


def faultless(scene: Scene, age: int) -> Scene:
    return scene


def next_colour(scene: Scene, age: int) -> Scene:
    """Every object in another colour than it was asked for."""
    names = COLOUR_NAMES
    things = [replace(t, colour=names[(names.index(t.colour) + 1) % 6]) for t in scene.things]
    return replace(scene, things=tuple(things))


@dataclass
class OracleState:
    seed: int
    scene: Scene
    clip: bytes
    next_index: int = 0
    age: int = 0
    remembered: Thing | None = None
    at_point: bool = False
    chunks: list[Chunk] = field(default_factory=list)


@dataclass
class Oracle:
    """An engine that renders what the prompt says; a returning object is the one last seen."""

    fault: Fault = faultless
    remembers: bool = True
    knows_synonyms: bool = True
    shape: StreamShape = field(default_factory=lambda: stream_shape(load_preset("echo-tiny")))
    fingerprint: str = "oracle"

    def understood(self, prompt: str) -> tuple[list[str], list[str]]:
        _, known, ignored = read_prompt(prompt)
        return known, ignored

    def open(self, prompt: str, seed: int, first_frames: bytes = b"") -> OracleState:
        return OracleState(seed, self._scene(prompt, seed, None), first_frames)

    def step(self, state: OracleState, prompts: Sequence[str] = ()) -> Chunk:
        if prompts:
            state.scene = self._scene(prompts[-1], state.seed, self._seen_before(state))
            state.age = 0
        index, shape = state.next_index, self.shape
        start, count = shape.first_frame(index), shape.frames_in(index)
        size = shape.width * shape.height * 3
        data = state.clip[start * size : (start + count) * size]
        if not data:
            scene = self.fault(state.scene, state.age)
            rng = np.random.default_rng(state.seed)
            chunk_T = np.zeros(HORIZON, dtype=np.int64)
            paths = animate(rng, as_script([scene]), shape.width, chunk_T)
            here = slice(start, start + count)
            last = replace(paths, **{name: value[here] for name, value in vars(paths).items()})
            data = as_bytes(last, shape.height, shape.width).tobytes()
        state.next_index, state.age = index + 1, state.age + 1
        chunk = Chunk(
            index, data, count, shape.height, shape.width, frames_digest(data),
            DriftReading(0.0), "", stage_seconds={"denoise": 0.004, "decode": 0.001},
        )  # fmt: skip
        parts = {"luminance": float(pixels(chunk).mean()) / 255}
        chunk = replace(chunk, drift=DriftReading(0.0, parts, self._flags(state)))
        state.chunks.append(chunk)
        return chunk

    def save(self, state: OracleState) -> Snapshot:
        return Snapshot(self.fingerprint, {}, {})

    def _flags(self, state: OracleState) -> tuple[str, ...]:
        return ()

    def _seen_before(self, state: OracleState) -> Thing | None:
        """The object of the latest chunk that shows one."""
        if not self.remembers:
            return None
        for chunk in reversed(state.chunks):
            seen = vote(read([chunk], 1))
            if seen.colour and seen.shape and seen.size:
                return Thing(colour=seen.colour, shape=seen.shape, size=seen.size, speed="slowly")
        return None

    def _scene(self, prompt: str, seed: int, remembered: Thing | None) -> Scene:
        ids, words, _ = read_prompt(prompt)
        known = [VOCABULARY[i] for i in ids]
        if not self.knows_synonyms:
            known = [v if v == w else "" for v, w in zip(known, words, strict=True)]
        behind = known.index("background") if "background" in known else 0
        background = known[behind - 1] if behind else "black"
        rest = known[: max(0, behind - 1)] + known[behind + 1 :]
        background = background if background in BACKGROUND_NAMES else "black"
        if "empty" in rest:
            return Scene(background=background, things=())
        lost = Thing(colour="cyan", shape="square", size="small", speed="slowly")
        if "back" in rest:
            return Scene(background=background, things=(remembered or lost,))
        pieces = " ".join(rest).split(" and ")
        return Scene(background=background, things=tuple(_thing(p.split(), seed) for p in pieces))


def _thing(words: list[str], seed: int) -> Thing:
    """What is not said is left to the seed."""

    def said(names: Sequence[str]) -> str:
        return next((w for w in words if w in names), names[seed % len(names)])

    return Thing(
        colour=said(COLOUR_NAMES),
        shape=said(SHAPE_NAMES),
        size=said(SIZE_NAMES),
        speed=said(SPEED_NAMES),
    )


@dataclass
class OracleSubject:
    """The oracle where the model has its memory, and one without where it has not."""

    engines: Callable[[Variant, int | None], Oracle]
    preset: Preset = field(default_factory=lambda: load_preset("echo-tiny"))

    def engine(self, variant: Variant = Variant.WHOLE, point_every: int | None = None) -> Oracle:
        return self.engines(variant, point_every)


def only(fault: Fault = faultless, **kwargs: object) -> OracleSubject:
    """One oracle for everything that is asked of it."""
    return OracleSubject(lambda variant, points: Oracle(fault, **kwargs))  # type: ignore[arg-type]


@pytest.fixture
def oracle() -> OracleSubject:
    return only()


@pytest.fixture
def liar() -> OracleSubject:
    return only(next_colour)


@pytest.fixture
def oracle_with() -> Callable[..., OracleSubject]:
    return only


@pytest.fixture
def small_subject() -> ModulesSubject:
    """A real engine over random weights."""
    modules = _modules(with_memory=True, codec="group")
    return ModulesSubject(small_preset(), modules, torch.device("cpu"), threads=1)
