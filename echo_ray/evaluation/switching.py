"""Prompt switches: how many chunks pass until the new prompt holds?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from echo_ray.evaluation.cases import (
    BACKGROUND_NAMES,
    COLOUR_NAMES,
    SHAPE_NAMES,
    Scene,
    Thing,
    caption,
    draw_scene,
    other,
)
from echo_ray.evaluation.chart import Line, Lines
from echo_ray.evaluation.report import Report
from echo_ray.evaluation.rollout import (
    Plan,
    Reading,
    case_rng,
    counted,
    read,
    roll,
    session_seed,
    vote,
)
from echo_ray.evaluation.statistics import Rate, quantile
from echo_ray.evaluation.subject import Subject

BEFORE = 5
"""Chunks of the old prompt: the window is full when the prompt changes."""
HELD = 3
"""So many chunks in a row make a prompt hold."""
LATEST = 8
"""A prompt that does not hold from here on at the latest does not hold."""


def chunks_until(right: Sequence[bool], held: int = HELD) -> float:
    """Number, from 1 on, of the first of `held` right chunks in a row; infinite without."""
    for start in range(len(right) - held + 1):
        if all(right[start : start + held]):
            return start + 1
    return math.inf


def measure(subject: Subject, plan: Plan) -> Report:
    """One switch a case, to another colour, background and shape; later the shape apart."""
    engine = subject.engine()
    waits: dict[str, list[float]] = {"colour and background": [], "and shape": []}
    curves: dict[str, list[list[bool]]] = {"background": [], "colour": [], "shape": []}
    records = []
    for index in counted("switching", range(plan.cases), plan.cases):
        rng = case_rng("switching", plan.seed, index)
        old = draw_scene(rng, 1)
        thing = old.things[0]
        new = Scene(
            background=other(rng, BACKGROUND_NAMES, old.background),
            things=(
                Thing(
                    colour=other(rng, COLOUR_NAMES, thing.colour),
                    shape=other(rng, SHAPE_NAMES, thing.shape),
                    size=thing.size,
                    speed=thing.speed,
                ),
            ),
        )
        prompts = {0: caption(old), BEFORE: caption(new)}
        total = BEFORE + LATEST + HELD - 1
        chunks = list(roll(engine, prompts, session_seed(rng), total))[BEFORE:]
        right = _verdicts([vote(read([c])) for c in chunks], new)
        for name, curve in curves.items():
            curve.append(right[name])
        both = [a and b for a, b in zip(right["background"], right["colour"], strict=True)]
        waits["colour and background"].append(chunks_until(both))
        shaped = [a and b for a, b in zip(both, right["shape"], strict=True)]
        waits["and shape"].append(chunks_until(shaped))
        waited = {name: values[-1] for name, values in waits.items()}
        records.append({"old": prompts[0], "new": prompts[BEFORE], "waits": waited, **right})
    return Report(
        what="switching",
        title="Chunks until a new prompt holds",
        figures={name: _figures(values) for name, values in waits.items()},
        cases=records,
        panels=[_held_panel(waits), _right_panel(curves)],
        notes=[f"1: the switch's own chunk is right already, and {HELD - 1} after it."],
    )


def _verdicts(seen: Sequence[Reading], scene: Scene) -> dict[str, list[bool]]:
    thing = scene.things[0]
    return {
        "background": [s.background == scene.background for s in seen],
        "colour": [s.colour == thing.colour for s in seen],
        "shape": [s.shape == thing.shape for s in seen],
    }


def _figures(waits: list[float]) -> dict[str, Rate | float]:
    return {
        "median": quantile(waits, 0.5),
        "90th percentile": quantile(waits, 0.9),
        "within 1 chunk": Rate.of(w <= 1 for w in waits),
        "within 2 chunks": Rate.of(w <= 2 for w in waits),
        "within 4 chunks": Rate.of(w <= 4 for w in waits),
        f"within {LATEST} chunks": Rate.of(w <= LATEST for w in waits),
    }


def _held_panel(waits: dict[str, list[float]]) -> Lines:
    steps = range(1, LATEST + 1)
    lines = [
        Line(name, [(n, Rate.of(w <= n for w in values).value) for n in steps])
        for name, values in waits.items()
    ]
    return Lines("New prompt holds within n chunks", lines, "chunks", 0.0, 1.0)


def _right_panel(curves: dict[str, list[list[bool]]]) -> Lines:
    lines = [
        Line(
            name,
            [(n + 1.0, Rate.of(column).value) for n, column in enumerate(zip(*rows, strict=True))],
        )
        for name, rows in curves.items()
    ]
    return Lines("Right in the n-th chunk", lines, "chunks since the switch", 0.0, 1.0)
