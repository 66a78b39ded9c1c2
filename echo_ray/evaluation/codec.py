"""The codec alone: held-out clips through it and back, by PSNR and by the detector.

A session is opened with the clip, so its first chunks are the clip through the codec; nothing is
generated.

Shapes: T frames, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from echo_ray.engine.frames import pixels
from echo_ray.evaluation.cases import (
    BACKGROUND_NAMES,
    COLOUR_NAMES,
    SHAPE_NAMES,
    caption,
    draw_scene,
    true_clip,
)
from echo_ray.evaluation.chart import Bar, Bars
from echo_ray.evaluation.report import Figure, Report, rate_bar
from echo_ray.evaluation.rollout import Plan, case_rng, counted, look, roll, session_seed
from echo_ray.evaluation.statistics import Rate, Spread, mean, psnr_db, squared_error
from echo_ray.evaluation.subject import Subject
from echo_ray.scenes.detector import Seen
from echo_ray.scenes.world import Frames

CHUNKS = 4
TRUE, ROUND_TRIP = "true frames", "after the round trip"
FIGURES = ("background", "count", "colour", "shape")


@dataclass(slots=True)
class Verdicts:
    """What the detector read, right or wrong: frame by frame, summed up by clip."""

    clips: dict[str, list[Rate]] = field(default_factory=lambda: {n: [] for n in FIGURES})

    def take(self, seen: Sequence[Seen], truth: Frames) -> None:
        """Compare a clip's frames with the truth; only those where no object hides another."""
        right: dict[str, list[bool]] = {name: [] for name in FIGURES}
        for t in np.flatnonzero(apart(truth)).tolist():
            shown = np.flatnonzero(truth.visible_TO[t])
            found = seen[t]
            behind = BACKGROUND_NAMES[truth.background_T[t]]
            right["background"].append(found.background == behind)
            right["count"].append(len(found.objects) == len(shown))
            for o in shown:
                nearest = min(
                    found.objects,
                    key=lambda s, o=o: math.hypot(  # type: ignore[misc]
                        s.x - truth.x_TO[t, o], s.y - truth.y_TO[t, o]
                    ),
                    default=None,
                )
                colour = COLOUR_NAMES[truth.colour_TO[t, o]]
                shape = SHAPE_NAMES[truth.shape_TO[t, o]]
                right["colour"].append(nearest is not None and nearest.colour == colour)
                right["shape"].append(nearest is not None and nearest.shape == shape)
        for name, outcomes in right.items():
            self.clips[name].append(Rate.of(outcomes))

    def rates(self) -> dict[str, Rate]:
        return {name: Rate.of_blocks(clips) for name, clips in self.clips.items()}


def apart(truth: Frames) -> NDArray[np.bool_]:
    """Whether, in each frame, all objects are clear of each other."""
    clear = np.ones(len(truth.background_T), dtype=bool)
    objects = truth.x_TO.shape[1]
    for a in range(objects):
        for b in range(a + 1, objects):
            distance = np.hypot(
                truth.x_TO[:, a] - truth.x_TO[:, b], truth.y_TO[:, a] - truth.y_TO[:, b]
            )
            # A square's corner reaches 1.25 times its radius.
            clear &= distance > 1.25 * (truth.radius_TO[:, a] + truth.radius_TO[:, b])
    return clear


def measure(subject: Subject, plan: Plan) -> Report:
    """Held-out clips of one and of two objects in turn."""
    engine = subject.engine()
    verdicts = {TRUE: Verdicts(), ROUND_TRIP: Verdicts()}
    errors, seconds, frames, records = [], 0.0, 0, []
    for index in counted("codec", range(plan.cases), plan.cases):
        rng = case_rng("codec", plan.seed, index)
        scene = draw_scene(rng, 1 + index % 2)
        clip, truth = true_clip(rng, [scene] * CHUNKS, engine.shape)
        chunks = list(roll(engine, {0: caption(scene)}, session_seed(rng), CHUNKS, clip.tobytes()))
        back = np.concatenate([pixels(c) for c in chunks])
        errors.append(squared_error(clip, back))
        seconds += sum(c.stage_seconds.get("decode", 0.0) for c in chunks)
        frames += len(back)
        verdicts[TRUE].take(look(clip), truth)
        verdicts[ROUND_TRIP].take(look(back), truth)
        records.append({"scene": caption(scene), "psnr_db": psnr_db(errors[-1])})
    decode_ms = 1000 * seconds / frames
    return Report(
        what="codec",
        title="Codec round trip",
        figures=_figures(errors, verdicts, decode_ms),
        cases=records,
        panels=[
            *(
                Bars(kind, [rate_bar(n, r) for n, r in v.rates().items()])
                for kind, v in verdicts.items()
            ),
            Bars(
                "PSNR, dB", [Bar("of the mean error", _capped(psnr_db(mean(errors))))],
                None, [("floor", 31.0)],
            ),
            Bars("Decode, ms a frame", [Bar("decode", decode_ms)], None, [("limit", 1.5)]),
        ],
        notes=[
            "Frames in which objects overlap are left out of the detector's figures. Frames of a "
            "clip are alike: intervals count every clip once."
        ],
    )  # fmt: skip


def _figures(
    errors: list[float], verdicts: dict[str, Verdicts], decode_ms: float
) -> dict[str, dict[str, Figure]]:
    figures: dict[str, dict[str, Figure]] = {
        "PSNR, dB": {
            "of the mean error": psnr_db(mean(errors)),
            "mean over clips": Spread.of([_capped(psnr_db(e)) for e in errors]),
        },
        "cost": {"decode, ms a frame": decode_ms},
    }
    for kind, each in verdicts.items():
        figures[kind] = dict(each.rates())
    return figures


def _capped(psnr: float) -> float:
    """Equal frames have an infinite PSNR, which has no place in a mean or a chart."""
    return min(psnr, 99.0)
