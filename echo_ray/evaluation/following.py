"""Prompt following: does the video show what the prompt says?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from echo_ray.evaluation.cases import Scene, caption, draw_scene
from echo_ray.evaluation.chart import Bars
from echo_ray.evaluation.report import Report, rate_bar
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
from echo_ray.evaluation.subject import Measured, Subject

FIRST, LAST = 2, 4
"""The chunks that are read."""
SIZED_IN = 2
"""Every so many cases the prompt names the object's size, so that size can be followed."""
GROUPS = {1: "one object", 2: "two objects", 0: "empty scene"}


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt and what its video showed."""

    scene: Scene
    prompt: str
    sized: bool
    seen: Reading

    @property
    def verdicts(self) -> dict[str, bool]:
        """Which of the prompt's words hold, by the name of the figure."""
        things = self.scene.things
        found = {"background": self.seen.background == self.scene.background}
        if not things:
            return found | {"nothing shown": self.seen.empty}
        found["count"] = self.seen.count == len(things)
        if len(things) == 1:
            return found | self._one()
        asked = sorted((t.colour, t.shape) for t in things)
        shown = list(self.seen.things)
        found["both colours"] = [c for c, _ in asked] == [c for c, _ in shown]
        found["both shapes"] = sorted(s for _, s in asked) == sorted(s for _, s in shown)
        found["each colour with its shape"] = asked == shown
        return found

    def _one(self) -> dict[str, bool]:
        thing = self.scene.things[0]
        colour, shape = self.seen.colour == thing.colour, self.seen.shape == thing.shape
        found = {"colour": colour, "shape": shape}
        if colour:
            found["shape where the colour is right"] = shape
        if self.sized:
            found["size"] = self.seen.size == thing.size
        behind = self.seen.background == self.scene.background
        size = self.seen.size == thing.size or not self.sized
        found["all of it"] = colour and shape and behind and size
        return found


def ask(engine: Measured, scene: Scene, prompt: str, seed: int, *, sized: bool = False) -> Answer:
    """Generate a few chunks of one prompt and read the last of them."""
    chunks = list(roll(engine, {0: prompt}, seed, LAST + 1))
    return Answer(scene, prompt, sized, vote(read(chunks[FIRST:])))


def asked(engine: Measured, plan: Plan, things: int, index: int) -> Answer:
    """The answer to prompt `index` of so many objects."""
    rng = case_rng(f"following {things}", plan.seed, index)
    scene = draw_scene(rng, things)
    sized = things == 1 and index % SIZED_IN == 0
    prompt = caption(scene, size=sized)
    return ask(engine, scene, prompt, session_seed(rng), sized=sized)


def rates(answers: list[Answer]) -> dict[str, Rate]:
    """Every figure over the answers that have it."""
    names = list(dict.fromkeys(name for a in answers for name in a.verdicts))
    return {
        name: Rate.of(a.verdicts[name] for a in answers if name in a.verdicts) for name in names
    }


def measure(subject: Subject, plan: Plan) -> Report:
    """So many prompts each of one object, of two, and of none."""
    engine = subject.engine()
    answers: dict[str, list[Answer]] = {name: [] for name in GROUPS.values()}
    work = [(things, index) for things in GROUPS for index in range(plan.cases)]
    for things, index in counted("following", work, len(work)):
        answers[GROUPS[things]].append(asked(engine, plan, things, index))
    figures = {group: rates(each) for group, each in answers.items()}
    everything = [a for each in answers.values() for a in each]
    figures["all prompts"] = {
        "background": Rate.of(a.verdicts["background"] for a in everything),
        "count": Rate.of(a.seen.count == len(a.scene.things) for a in everything),
    }
    return Report(
        what="following",
        title="Prompt following",
        figures=figures,
        cases=[record(a) for a in everything],
        panels=[
            Bars(group, [rate_bar(n, r) for n, r in rows.items()])
            for group, rows in figures.items()
        ],
        notes=[f"Read from the last frames of chunks {FIRST} to {LAST}."],
    )


def record(answer: Answer) -> dict[str, Any]:
    """One prompt and what was seen, in plain values."""
    seen = answer.seen
    return {
        "prompt": answer.prompt,
        "background": seen.background,
        "count": seen.count,
        "things": [" ".join(t) for t in seen.things],
        "size": seen.size,
        "verdicts": answer.verdicts,
    }
