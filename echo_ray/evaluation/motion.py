"""Motion: do objects move as they do in the true world, and as the prompt says?

Centres are read by the same detector from generated chunks and from rendered true clips of the same
scenes, so that its own error is in both samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from echo_ray.engine.frames import pixels
from echo_ray.evaluation.cases import SPEED_NAMES, Scene, caption, draw_scene, true_clip
from echo_ray.evaluation.chart import Bar, Bars, Line, Lines
from echo_ray.evaluation.report import Figure, Report, rate_bar
from echo_ray.evaluation.rollout import Plan, case_rng, counted, look, roll, session_seed
from echo_ray.evaluation.statistics import Rate, Spread, kolmogorov_smirnov, mean, quantile
from echo_ray.evaluation.subject import Subject
from echo_ray.scenes.world import SPEEDS
from echo_ray.session.engine_port import StreamShape

CHUNKS = 8
SKIPPED = 2
"""First chunks that are not read: the object is only coming into being."""
STRIDE = 3
"""Frames over which a velocity is taken, to keep the detector's jitter small beside it."""
TURNED = 0.25
"""Pixels a frame, before and after, from which on a change of direction is a bounce."""
TRUE, MADE = "true clips", "generated"
SAMPLES = ("speed", "acceleration", "bounces in 100 frames")

Track = list[tuple[float, float] | None]


@dataclass(slots=True)
class Movement:
    """What was measured of several tracks."""

    samples: dict[str, list[float]] = field(default_factory=lambda: {n: [] for n in SAMPLES})
    seen: int = 0
    frames: int = 0
    """Frames that show exactly one object, and all frames."""

    def take(self, track: Track) -> float:
        """Add a track; returns its usual speed, nan of one that is nowhere long enough."""
        self.frames += len(track)
        self.seen += sum(point is not None for point in track)
        speeds = []
        turns, moved = 0, 0
        for run in runs(track):
            velocity = (run[STRIDE:] - run[:-STRIDE]) / STRIDE
            pace = np.hypot(velocity[:, 0], velocity[:, 1])
            speeds += pace.tolist()
            change = (velocity[STRIDE:] - velocity[:-STRIDE]) / STRIDE
            self.samples["acceleration"] += np.hypot(change[:, 0], change[:, 1]).tolist()
            turns += bounces(velocity)
            moved += len(run)
        self.samples["speed"] += speeds
        if moved:
            self.samples["bounces in 100 frames"].append(100 * turns / moved)
        return quantile(speeds, 0.5)


def runs(track: Track) -> list[NDArray[np.float64]]:
    """Unbroken stretches of a track that are long enough to have a velocity and its change."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for point in track:
        if point is None:
            stretches.append([])
        else:
            stretches[-1].append(point)
    return [np.array(s, dtype=np.float64) for s in stretches if len(s) > 2 * STRIDE]


def bounces(velocity: NDArray[np.float64]) -> int:
    """How often a component of the velocity changes its sign, small ones left out."""
    turns = 0
    for component in velocity.T:
        clear = np.sign(component[np.abs(component) > TURNED])
        turns += int((clear[1:] != clear[:-1]).sum())
    return turns


def centres(frames: NDArray[np.uint8]) -> Track:
    """The one object's centre, frame by frame; None where there is none, or more than one."""
    return [(s.objects[0].x, s.objects[0].y) if len(s.objects) == 1 else None for s in look(frames)]


def nearest_speed(speed: float) -> str | None:
    """The speed word that is nearest; None of what is no number."""
    if not math.isfinite(speed):
        return None
    return min(SPEEDS, key=lambda word: abs(SPEEDS[word] - speed))


def measure(subject: Subject, plan: Plan) -> Report:
    """One object a case under a prompt that names its speed, and its true clip beside it."""
    engine = subject.engine()
    movements = {TRUE: Movement(), MADE: Movement()}
    followed: dict[str, list[bool]] = {word: [] for word in SPEEDS}
    truth_right: list[bool] = []
    records = []
    for index in counted("motion", range(plan.cases), plan.cases):
        rng = case_rng("motion", plan.seed, index)
        scene = draw_scene(rng, 1)
        # Both words are asked for equally often.
        thing = replace(scene.things[0], speed=SPEED_NAMES[index % len(SPEED_NAMES)])
        scene = replace(scene, things=(thing,))
        prompt = caption(scene, size=True, speed=True)
        chunks = list(roll(engine, {0: prompt}, session_seed(rng), CHUNKS))[SKIPPED:]
        made = movements[MADE].take(centres(np.concatenate([pixels(c) for c in chunks])))
        true = movements[TRUE].take(centres(_true_frames(rng, scene, engine.shape)))
        word = scene.things[0].speed
        followed[word].append(nearest_speed(made) == word)
        truth_right.append(nearest_speed(true) == word)
        records.append({"prompt": prompt, "speed": made, "true_speed": true})
    return Report(
        what="motion",
        title="Motion against the true world's",
        figures=_figures(movements, followed, truth_right),
        cases=records,
        panels=[
            *(_distribution(name, movements) for name in SAMPLES),
            Bars(
                "Speed word followed",
                [rate_bar(word, Rate.of(right)) for word, right in followed.items()],
                marks=[("chance", 0.5)],
            ),
        ],
        notes=[
            "Pixels a frame. Distance: Kolmogorov-Smirnov's, 0 for equal distributions, 1 for "
            "disjoint ones; frames follow each other, so p is far too sure of itself."
        ],
    )


def _true_frames(rng: np.random.Generator, scene: Scene, shape: StreamShape) -> NDArray[np.uint8]:
    frames, _ = true_clip(rng, [scene] * CHUNKS, shape)
    return frames[shape.first_frame(SKIPPED) :]


def _figures(
    movements: dict[str, Movement], followed: dict[str, list[bool]], truth_right: list[bool]
) -> dict[str, dict[str, Figure]]:
    figures: dict[str, dict[str, Figure]] = {}
    for name in SAMPLES:
        true, made = movements[TRUE].samples[name], movements[MADE].samples[name]
        gap = kolmogorov_smirnov(true, made)
        figures[name] = {
            TRUE: Spread.of(true),
            MADE: Spread.of(made),
            "distance": gap.distance,
            "p": gap.p_value,
        }
    figures["frames with exactly one object"] = {
        name: Rate(m.seen, m.frames) for name, m in movements.items()
    }
    figures["speed word followed"] = {
        **{word: Rate.of(right) for word, right in followed.items()},
        "both": Rate.of(r for right in followed.values() for r in right),
        "by the true clips": Rate.of(truth_right),
    }
    return figures


def _distribution(name: str, movements: dict[str, Movement]) -> Lines | Bars:
    """Both samples' densities over one axis."""
    samples = {kind: m.samples[name] for kind, m in movements.items()}
    if not all(samples.values()):
        return Bars(name, [Bar(kind, mean(values)) for kind, values in samples.items()], top=None)
    top = max(quantile(values, 0.99) for values in samples.values()) or 1.0
    edges = np.linspace(0.0, top, 25)
    lines = [Line(kind, _density(values, edges)) for kind, values in samples.items()]
    return Lines(name, lines, "pixels a frame" if name == "speed" else "", bottom=0.0)


def _density(values: Sequence[float], edges: NDArray[np.float64]) -> list[tuple[float, float]]:
    shares = np.histogram(values, edges)[0] / len(values)
    return [
        (float((a + b) / 2), float(s)) for a, b, s in zip(edges, edges[1:], shares, strict=False)
    ]
