"""Recall: does an object that was hidden for longer than the window come back as it was?

An empty chunk, so that the sink holds no hint; two chunks with one object whose colour and size the
prompt does not name; a number of empty chunks; then "it comes back". All but the return is a true
clip that the session is opened with, or everything is the model's own. As a control of the ablation
the object is also shown in the first chunk already: then the sink alone is enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from echo_ray.evaluation.cases import (
    COLOUR_NAMES,
    Scene,
    Thing,
    caption,
    draw_scene,
    return_caption,
    true_clip,
)
from echo_ray.evaluation.chart import Line, Lines
from echo_ray.evaluation.report import Figure, Report
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
from echo_ray.evaluation.statistics import Rate
from echo_ray.evaluation.subject import Measured, Subject, window_chunks
from echo_ray.evaluation.variants import Variant

SHOWN = 2
"""Chunks in which the object is to be seen before it hides."""
RETURNED = 3
"""Chunks generated after the return; the last two are read."""
WINDOWS = (1, 2, 4, 8)
PLAIN = (4, 12, 40)
ABLATED = (4, 12)
OWN = (4, 12)
CONTROL = 4
GIVEN, IN_SINK, OWN_CLIP = "given clip", "object in the first chunk", "self-generated"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One return, beside what was to be remembered."""

    source: str
    variant: Variant
    hidden: int
    colour: str
    shape: str
    size: str
    seen: Reading

    @property
    def appeared(self) -> bool:
        return self.seen.colour is not None


def measure(subject: Subject, plan: Plan) -> Report:
    """The whole model at every time of hiding; without a tier at some; and self-generated."""
    with_memory = subject.preset.cache.memory is not None
    window = window_chunks(subject.preset)
    times = sorted({window * n for n in WINDOWS} | set(PLAIN))
    ablated = sorted({window, *ABLATED})
    variants = [v for v in Variant if with_memory or v is Variant.WHOLE]
    engines = {v: subject.engine(v) for v in variants}
    work = [(v, h, GIVEN) for v in variants for h in (times if v is Variant.WHOLE else ablated)]
    work += [(Variant.WHOLE, h, OWN_CLIP) for h in OWN]
    work += [(v, CONTROL, IN_SINK) for v in variants if v is not Variant.FROZEN]
    outcomes: list[Outcome] = []
    todo = [(index, *job) for index in range(plan.cases) for job in work]
    for index, variant, hidden, source in counted("recall", todo, len(todo)):
        run = _own_return if source == OWN_CLIP else given_return
        outcome = run(engines[variant], plan, index, variant, hidden, source)
        outcomes += [outcome] if outcome else []
    notes = [
        f"The window is {window} chunks. Colour, shape and size count where an object appeared; "
        f"chance is 1 in {len(COLOUR_NAMES)} for the colour."
    ]
    if not with_memory:
        notes.append(f"Preset {subject.preset.name} has no memory: nothing to take away.")
    return Report(
        what="recall",
        title="Recall of a hidden object",
        figures=_figures(outcomes),
        cases=[record(o) for o in outcomes],
        panels=[
            _panel("Colour recalled", outcomes, "colour", 1 / len(COLOUR_NAMES)),
            _panel("Shape recalled", outcomes, "shape", 1 / 3),
            _panel("Size recalled", outcomes, "size", 1 / 2),
            _panel("An object appeared", outcomes, "appeared", None),
        ],
        notes=notes,
    )


def story(scene: Scene, hidden: int, *, in_sink: bool = False) -> list[Scene]:
    """What each chunk shows up to the return."""
    first = scene if in_sink else scene.emptied
    return [first, *[scene] * SHOWN, *[scene.emptied] * hidden]


def prompts_of(scene: Scene, hidden: int, *, colour: bool, in_sink: bool = False) -> dict[int, str]:
    """The prompt from each chunk on at which it changes."""
    empty = caption(scene.emptied)
    shown = caption(scene, colour=colour, size=colour)
    return {
        0: shown if in_sink else empty,
        **({} if in_sink else {1: shown}),
        1 + SHOWN: empty,
        1 + SHOWN + hidden: return_caption(scene),
    }


def given_return(
    engine: Measured, plan: Plan, index: int, variant: Variant, hidden: int, source: str
) -> Outcome:
    """One return after a true clip; `source` says whether the first chunk shows the object too."""
    rng = case_rng(f"recall {hidden}", plan.seed, index)
    scene, in_sink = draw_scene(rng, 1), source == IN_SINK
    clip, _ = true_clip(rng, story(scene, hidden, in_sink=in_sink), engine.shape)
    prompts = prompts_of(scene, hidden, colour=False, in_sink=in_sink)
    total = 1 + SHOWN + hidden + RETURNED
    chunks = list(roll(engine, prompts, session_seed(rng), total, clip.tobytes()))
    return _outcome(source, variant, hidden, scene.things[0], vote(read(chunks[-2:])))


def _own_return(
    engine: Measured, plan: Plan, index: int, variant: Variant, hidden: int, source: str
) -> Outcome | None:
    """Everything generated; what was shown is what counts, so nothing where nothing was."""
    rng = case_rng(f"recall own {hidden}", plan.seed, index)
    scene = draw_scene(rng, 1)
    prompts = prompts_of(scene, hidden, colour=True)
    total = 1 + SHOWN + hidden + RETURNED
    chunks = list(roll(engine, prompts, session_seed(rng), total))
    shown = vote(read(chunks[SHOWN : SHOWN + 1]))
    if shown.colour is None or shown.shape is None or shown.size is None:
        return None
    thing = Thing(
        colour=shown.colour, shape=shown.shape, size=shown.size, speed=scene.things[0].speed
    )
    return _outcome(source, variant, hidden, thing, vote(read(chunks[-2:])))


def _outcome(source: str, variant: Variant, hidden: int, thing: Thing, seen: Reading) -> Outcome:
    return Outcome(
        source=source,
        variant=variant,
        hidden=hidden,
        colour=thing.colour,
        shape=thing.shape,
        size=thing.size,
        seen=seen,
    )


def recalled(outcomes: Sequence[Outcome], attribute: str) -> Rate:
    """How often an attribute came back, where an object did; or how often one did."""
    if attribute == "appeared":
        return Rate.of(o.appeared for o in outcomes)
    return Rate.of(
        getattr(o.seen, attribute) == getattr(o, attribute) for o in outcomes if o.appeared
    )


def _group(outcome: Outcome) -> str:
    if outcome.source == OWN_CLIP:
        return OWN_CLIP
    control = f", {IN_SINK}" if outcome.source == IN_SINK else ""
    return f"{outcome.variant.value}{control}"


def _figures(outcomes: Sequence[Outcome]) -> dict[str, Mapping[str, Figure]]:
    figures: dict[str, Mapping[str, Figure]] = {}
    for group in dict.fromkeys(_group(o) for o in outcomes):
        mine = [o for o in outcomes if _group(o) == group]
        figures[group] = {
            f"{name}, {hidden} hidden": recalled([o for o in mine if o.hidden == hidden], name)
            for name in ("colour", "shape", "size", "appeared")
            for hidden in sorted({o.hidden for o in mine})
        }
    figures["points of colour above"] = _advantages(outcomes)
    return {group: rows for group, rows in figures.items() if rows}


def _advantages(outcomes: Sequence[Outcome]) -> dict[str, Figure]:
    """Whole model less each ablation, at the times of hiding that both have."""

    def colour(variant: Variant, hidden: int) -> Rate:
        mine = [o for o in outcomes if (_group(o), o.hidden) == (variant.value, hidden)]
        return recalled(mine, "colour")

    found: dict[str, Figure] = {}
    for variant in list(Variant)[1:]:
        for hidden in sorted({o.hidden for o in outcomes if _group(o) == variant.value}):
            points = 100 * (colour(Variant.WHOLE, hidden).value - colour(variant, hidden).value)
            found[f"{variant.value}, {hidden} hidden"] = points
    return found


def _panel(title: str, outcomes: Sequence[Outcome], attribute: str, chance: float | None) -> Lines:
    lines = []
    for group in dict.fromkeys(_group(o) for o in outcomes if o.source != IN_SINK):
        mine = [o for o in outcomes if _group(o) == group]
        points = [
            (float(h), recalled([o for o in mine if o.hidden == h], attribute).value)
            for h in sorted({o.hidden for o in mine})
        ]
        lines.append(Line(group, [p for p in points if math.isfinite(p[1])]))
    marks = [] if chance is None else [("chance", chance)]
    return Lines(title, lines, "chunks hidden", 0.0, 1.0, marks, by_rank=True)


def record(outcome: Outcome) -> dict[str, Any]:
    """One return in plain values."""
    seen = outcome.seen
    return {
        "source": outcome.source,
        "variant": outcome.variant.value,
        "hidden": outcome.hidden,
        "was": [outcome.colour, outcome.shape, outcome.size],
        "came": [seen.colour, seen.shape, seen.size],
    }
