"""Consolidation: what does the rebuild of the window at a point cost?

The same cases with the preset's points and with none, everything else equal: one object, and two.
Up to the first point both must be the same bits; the chunk after it is compared by PSNR, what
follows by the share of chunks in which the prompt holds. One figure is the answer: the largest
loss.
"""

from __future__ import annotations

from echo_ray.engine.frames import pixels
from echo_ray.errors import ConfigError, EngineError
from echo_ray.evaluation.cases import Scene, caption, draw_scene
from echo_ray.evaluation.chart import Bars, Line, Lines
from echo_ray.evaluation.following import Answer, rates
from echo_ray.evaluation.report import Figure, Report, rate_bar
from echo_ray.evaluation.rollout import Plan, case_rng, counted, read, roll, session_seed, vote
from echo_ray.evaluation.statistics import Change, Rate, Spread, mean, psnr_db, squared_error
from echo_ray.evaluation.subject import Subject
from echo_ray.session.chunk import Chunk

WITH, WITHOUT = "with points", "without"
PERIODS = 2
"""How many points each case passes."""
OBJECTS = (1, 2)
Answers = dict[str, list[dict[str, Rate]]]
"""With points and without: of each case, how many of its chunks are right, by figure."""
CHARTED = ("background", "colour", "shape", "both colours")
LOSSLESS_DB = 99.0
"""What stands for an infinite PSNR in means and charts."""


def measure(subject: Subject, plan: Plan) -> Report:
    """So many cases of each number of objects, each run twice.

    Raises `ConfigError` for a model that is never consolidated.
    """
    every = subject.preset.cache.point_every
    if not every:
        raise ConfigError(
            f"preset {subject.preset.name} has cache.point_every = 0: there is nothing to compare",
            param="model.preset",
        )
    engines = {WITH: subject.engine(), WITHOUT: subject.engine(point_every=0)}
    total = every * PERIODS + 4
    answers: Answers = {WITH: [], WITHOUT: []}
    seams, curves, records = [], [], []
    work = [(objects, index) for index in range(plan.cases) for objects in OBJECTS]
    for objects, index in counted("consolidation", work, len(work)):
        rng = case_rng(f"consolidation {objects}", plan.seed, index)
        scene = draw_scene(rng, objects)
        prompt, seed = caption(scene), session_seed(rng)
        runs = {
            name: list(roll(engine, {0: prompt}, seed, total)) for name, engine in engines.items()
        }
        gaps = [_psnr(a, b) for a, b in zip(runs[WITH], runs[WITHOUT], strict=True)]
        if min(gaps[:every]) < LOSSLESS_DB:
            raise EngineError(f"case {index}: chunks differ before the first point, at {every}")
        right = {name: _right(scene, prompt, chunks[every:]) for name, chunks in runs.items()}
        for name, found in right.items():
            answers[name].append(found)
        seams.append(gaps[every])
        curves.append(gaps)
        records.append({"prompt": prompt, "psnr_db": gaps, "right": right})
    return Report(
        what="consolidation",
        title="What consolidation costs",
        figures=_figures(answers, seams),
        cases=records,
        panels=[
            Lines(
                "PSNR against the run without points",
                [Line("mean of the cases", _points(curves))],
                "chunk",
                bottom=0.0,
                top=100.0,
            ),
            _bars(answers),
        ],
        notes=[
            f"Points every {every} chunks; read from the first on, {PERIODS * every + 4} chunks in "
            f"all. {LOSSLESS_DB:.0f} dB stands for equal frames. Both runs are compared case by "
            "case, each case by its share of chunks. The largest of several losses looks larger "
            "than it is, and never smaller."
        ],
    )


def _psnr(first: Chunk, second: Chunk) -> float:
    """Between two chunks, in dB, at most `LOSSLESS_DB`."""
    return min(LOSSLESS_DB, psnr_db(squared_error(pixels(first), pixels(second))))


def _points(curves: list[list[float]]) -> list[tuple[float, float]]:
    return [(float(n), mean(column)) for n, column in enumerate(zip(*curves, strict=True))]


def _right(scene: Scene, prompt: str, chunks: list[Chunk]) -> dict[str, Rate]:
    return rates([Answer(scene, prompt, False, vote(read([chunk]))) for chunk in chunks])


def _rates(answers: list[dict[str, Rate]]) -> dict[str, Rate]:
    names = list(dict.fromkeys(name for a in answers for name in a))
    return {name: Rate.of_blocks(a[name] for a in answers if name in a) for name in names}


def _figures(answers: Answers, seams: list[float]) -> dict[str, dict[str, Figure]]:
    changes = _changes(answers)
    worst = min(changes, key=lambda name: (changes[name].points, changes[name].low))
    return {
        "the largest loss": {
            "of": worst,
            "compared cases": len(_pairs(answers, worst)),
            **changes[worst].rows("points lost or won"),
        },
        "the chunk after the first point": {
            "PSNR against none, dB": Spread.of(seams),
            "worst, dB": min(seams),
        },
        WITH: dict(_rates(answers[WITH])),
        WITHOUT: dict(_rates(answers[WITHOUT])),
        "points lost or won": {name: change.points for name, change in changes.items()},
    }


def _pairs(answers: Answers, name: str) -> list[tuple[float, float]]:
    """Shares without points and with them, of the cases that have them both times."""
    both = zip(answers[WITHOUT], answers[WITH], strict=True)
    return [(off[name].value, on[name].value) for off, on in both if name in off and name in on]


def _changes(answers: Answers) -> dict[str, Change]:
    names = dict.fromkeys(name for a in answers[WITHOUT] for name in a)
    pairs = {name: _pairs(answers, name) for name in names}
    return {name: Change.paired(each) for name, each in pairs.items() if each}


def _bars(answers: Answers) -> Bars:
    """Both runs side by side, what matters most of it."""
    on, off = _rates(answers[WITH]), _rates(answers[WITHOUT])
    bars = [
        bar
        for name in CHARTED
        if name in on
        for bar in (rate_bar(name, on[name]), rate_bar(name, off[name], 1))
    ]
    return Bars("Following", bars, legend=(WITH, WITHOUT), together=2)
