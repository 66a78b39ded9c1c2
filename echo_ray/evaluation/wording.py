"""Wording: does the same scene come out, however it is asked for?

The same scenes and seeds in the wordings of `echo_ray.scenes.captions`: the template's, another
order, other words for the same things, and words around it that the model does not know.
"""

from __future__ import annotations

from typing import Any

from echo_ray.evaluation.cases import as_script, draw_scene
from echo_ray.evaluation.chart import Bars
from echo_ray.evaluation.following import Answer, ask, rates
from echo_ray.evaluation.report import Figure, Report, rate_bar
from echo_ray.evaluation.rollout import Plan, case_rng, counted, session_seed
from echo_ray.evaluation.statistics import Rate, mean
from echo_ray.evaluation.subject import Measured, Subject
from echo_ray.scenes.captions import WORDINGS, paraphrases

SHOWN = ("background", "colour", "shape", "all of it")
"""All of it: with the size, which every wording names."""


def measure(subject: Subject, plan: Plan) -> Report:
    """One object a case, asked for in each wording with the same seed."""
    engine = subject.engine()
    answers: dict[str, list[Answer]] = {name: [] for name in WORDINGS}
    understood: dict[str, list[float]] = {name: [] for name in WORDINGS}
    records: list[dict[str, Any]] = []
    work = [(index, name) for index in range(plan.cases) for name in WORDINGS]
    for index, name in counted("wording", work, len(work)):
        rng = case_rng("wording", plan.seed, index)
        scene = draw_scene(rng, 1)
        seed = session_seed(rng)
        prompt = paraphrases(rng, as_script([scene]), 0)[name]
        answer = ask(engine, scene, prompt, seed, sized=True)
        answers[name].append(answer)
        known, ignored = engine.understood(prompt)
        understood[name].append(len(known) / max(1, len(known) + len(ignored)))
        records.append(
            {
                "wording": name,
                "prompt": prompt,
                "understood": known,
                "ignored": ignored,
                "verdicts": answer.verdicts,
            }
        )
    by_name = {name: rates(each) for name, each in answers.items()}
    return Report(
        what="wording",
        title="The same scenes in other words",
        figures=_figures(by_name, understood),
        cases=records,
        panels=[
            Bars(what, [rate_bar(name, rows[what]) for name, rows in by_name.items()])
            for what in SHOWN
        ],
        notes=_example(engine),
    )


def _figures(
    by_name: dict[str, dict[str, Rate]], understood: dict[str, list[float]]
) -> dict[str, dict[str, Figure]]:
    figures: dict[str, dict[str, Figure]] = {
        name: {what: rows[what] for what in SHOWN} | {"words understood": mean(understood[name])}
        for name, rows in by_name.items()
    }
    plain = by_name["template"]
    figures["points below the template"] = {
        f"{name}, {what}": 100 * (plain[what].value - by_name[name][what].value)
        for name in WORDINGS[1:]
        for what in SHOWN[:3]
    }
    return figures


def _example(engine: Measured) -> list[str]:
    prompt = "please show me a cool crimson ball dancing happily over a dark backdrop"
    known, ignored = engine.understood(prompt)
    return [
        f"Of {prompt!r} the model understands {' '.join(known) or 'nothing'} and ignores "
        f"{' '.join(ignored) or 'nothing'}."
    ]
