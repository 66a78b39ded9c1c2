"""Comparison: several models, and the first of them with a tier taken away, on the same cases.

A shortened recall (given clips), prompts of one object, and how well the prompt still holds late in
a stream: enough to put the models of an ablation side by side. Every model gets the same scenes,
clips, prompts and noise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from echo_ray.config import ModelSection
from echo_ray.errors import ConfigError, InvalidRequestError, ModelUnknown
from echo_ray.evaluation import following, recall
from echo_ray.evaluation.cases import COLOUR_NAMES, caption, draw_scene
from echo_ray.evaluation.chart import Bars
from echo_ray.evaluation.report import Figure, Report, rate_bar
from echo_ray.evaluation.rollout import Plan, case_rng, counted, read, roll, session_seed, vote
from echo_ray.evaluation.statistics import Rate
from echo_ray.evaluation.subject import Measured, Subject
from echo_ray.evaluation.variants import Variant
from echo_ray.preset import preset_folder
from echo_ray.weights.location import check_model
from echo_ray.weights.manifest import FILE

WHAT = "compare"
CASES = 48
"""Unless told otherwise."""
HIDDEN = (4, 12)
"""Chunks for which the object of a return is away."""
SHOWN = ("background", "colour", "shape")
"""What is read from the videos of prompts of one object."""
STREAM = 60
"""Chunks of a stream under one prompt, of which the last third is read."""
CASES_A_STREAM = 6
"""So many cases come with one such stream."""
NAME = re.compile(r"[A-Za-z0-9_.-]{1,24}")


@dataclass(frozen=True, slots=True)
class Contestant:
    """One row of the table: an engine, and what was found out about it so far."""

    engine: Measured
    variant: Variant
    returns: list[recall.Outcome] = field(default_factory=list)
    answers: list[following.Answer] = field(default_factory=list)
    late: list[bool] = field(default_factory=list)

    def take(self, plan: Plan, index: int) -> None:
        """Put one case of each kind to the engine."""
        for hidden in HIDDEN:
            outcome = recall.given_return(
                self.engine, plan, index, self.variant, hidden, recall.GIVEN
            )
            self.returns.append(outcome)
        self.answers.append(following.asked(self.engine, plan, 1, index))
        if index % CASES_A_STREAM == 0:
            self.late.extend(late_in_a_stream(self.engine, plan, index))

    def rates(self) -> dict[str, Rate]:
        """Every figure by its name."""
        found: dict[str, Rate] = {}
        for name, words in (("colour", "colour recalled"), ("appeared", "an object came back")):
            for hidden in HIDDEN:
                mine = [o for o in self.returns if o.hidden == hidden]
                found[f"{words}, {hidden} chunks hidden"] = recall.recalled(mine, name)
        shown = following.rates(self.answers)
        found |= {f"one object: {name}": shown[name] for name in SHOWN}
        first = STREAM - STREAM // 3 + 1
        return found | {f"prompt right in chunks {first} to {STREAM}": Rate.of(self.late)}

    def records(self, label: str) -> list[dict[str, Any]]:
        returns = [{"model": label, "kind": "return"} | recall.record(o) for o in self.returns]
        return returns + [
            {"model": label, "kind": "prompt"} | following.record(a) for a in self.answers
        ]


def named_models(words: Sequence[str], config: ModelSection) -> dict[str, ModelSection]:
    """Models given as NAME=FOLDER, each with the device and threads of `config`.

    FOLDER is what `echo-ray train` wrote, a packaged preset's name, or weights of the configured
    preset. Raises `InvalidRequestError`, and what a look at each model raises.
    """
    if not words:
        raise InvalidRequestError(
            f"evaluate {WHAT}: no model is named; give --model NAME=FOLDER, once for each",
            param="model",
        )
    models: dict[str, ModelSection] = {}
    for word in words:
        name, _, folder = word.partition("=")
        if not NAME.fullmatch(name) or not folder:
            raise InvalidRequestError(
                f"--model {word!r}: write it as NAME=FOLDER; a name is 1 to 24 letters, digits, "
                "dots, dashes or underscores",
                param="model",
            )
        if name in models:
            raise InvalidRequestError(
                f"--model {word!r}: the name {name} is given twice; give each model its own",
                param="model",
            )
        models[name] = _model_in(folder, config, word)
        check_model(models[name])
    return models


def refuse_models(words: Sequence[str], what: str) -> None:
    """Raise `InvalidRequestError` if models are named for an instrument that measures one."""
    if words:
        raise InvalidRequestError(
            f"--model {words[0]!r}: only for evaluate {WHAT}; for {what} name the model with --set "
            "model.preset=FOLDER",
            param="model",
        )


def _model_in(folder: str, config: ModelSection, word: str) -> ModelSection:
    try:
        preset_folder(folder)
    except ModelUnknown:
        if (Path(folder) / FILE).is_file():
            return replace(config, weights=folder)
        raise InvalidRequestError(
            f"--model {word!r}: {folder} is no weights folder (it has no {FILE}) and no packaged "
            "preset; name a folder that echo-ray train or echo-ray weights convert wrote",
            param="model",
        ) from None
    return replace(config, preset=folder, weights=None)


def measure(subjects: Mapping[str, Subject], plan: Plan) -> Report:
    """Every model as it is, and the first one without each tier, over the same cases.

    Raises `ConfigError` if the first one has no memory.
    """
    contestants = _contestants(subjects)
    todo = [(index, label) for index in range(plan.cases) for label in contestants]
    for index, label in counted(WHAT, todo, len(todo)):
        contestants[label].take(plan, index)
    rates = {label: contestant.rates() for label, contestant in contestants.items()}
    names = list(next(iter(rates.values())))
    figures: dict[str, dict[str, Figure]] = {
        name: {label: each[name] for label, each in rates.items()} for name in names
    }
    figures["fingerprint"] = {label: c.engine.fingerprint for label, c in contestants.items()}
    first = next(iter(subjects))
    return Report(
        what=WHAT,
        title="Models side by side",
        figures=figures,
        cases=[record for label, c in contestants.items() for record in c.records(label)],
        panels=[_panel(name, rates, tuple(subjects)) for name in names],
        notes=[
            f'A row that begins with "{first}," is {first} with its weights as they are and a tier '
            "of its past taken away.",
            f"A recalled colour counts where an object came back; chance is 1 in "
            f"{len(COLOUR_NAMES)}. Chunks of a stream are alike, so the interval of the last rate "
            "is narrower than it should be.",
        ],
    )


def late_in_a_stream(engine: Measured, plan: Plan, index: int) -> list[bool]:
    """Whether background and colour are the prompt's, chunk by chunk in a stream's last third."""
    rng = case_rng(f"{WHAT} stream", plan.seed, index)
    scene = draw_scene(rng, 1)
    prompt = caption(scene)
    chunks = roll(engine, {0: prompt}, session_seed(rng), STREAM)
    right = []
    for chunk in islice(chunks, STREAM - STREAM // 3, None):
        seen = following.Answer(scene, prompt, sized=False, seen=vote(read([chunk], 1)))
        right.append(seen.verdicts["background"] and seen.verdicts["colour"])
    return right


def _taken(first: str) -> dict[str, Variant]:
    """The first model's variants by the names of their rows."""
    return {f"{first}, {v.value}": v for v in Variant if v is not Variant.WHOLE}


def _contestants(subjects: Mapping[str, Subject]) -> dict[str, Contestant]:
    (first, subject), *others = subjects.items()
    if subject.preset.cache.memory is None:
        raise ConfigError(
            f"--model {first}: its preset {subject.preset.name} has no memory, so there is no tier "
            "of it to take away; name a model with a memory first",
            param="model",
        )
    rows = {first: Contestant(subject.engine(), Variant.WHOLE)}
    for label, variant in _taken(first).items():
        rows[label] = Contestant(subject.engine(variant), variant)
    return rows | {name: Contestant(s.engine(), Variant.WHOLE) for name, s in others}


def _panel(name: str, rates: Mapping[str, Mapping[str, Rate]], models: Sequence[str]) -> Bars:
    bars = [rate_bar(label, each[name], int(label not in models)) for label, each in rates.items()]
    recalled = name.startswith("colour recalled")
    return Bars(name, bars, marks=[("chance", 1 / len(COLOUR_NAMES))] if recalled else [])
