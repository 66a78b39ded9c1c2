"""Every instrument by the name that the command line gives it."""

from __future__ import annotations

import difflib
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from echo_ray.errors import InvalidRequestError
from echo_ray.evaluation import (
    codec,
    compare,
    consolidation,
    drift,
    external,
    following,
    motion,
    recall,
    speed,
    switching,
    wording,
)
from echo_ray.evaluation.report import Origin, Report, write
from echo_ray.evaluation.rollout import Plan
from echo_ray.evaluation.subject import Subject, check_world
from echo_ray.out_folder import claim

ALL = "all"


@dataclass(frozen=True, slots=True)
class Instrument:
    """One measurement; `cases` is how many it takes unless told otherwise."""

    measure: Callable[[Subject, Plan], Report]
    cases: int
    help: str
    any_world: bool = False
    """Whether it can measure models that the detector cannot read."""


INSTRUMENTS: Mapping[str, Instrument] = {
    "following": Instrument(following.measure, 96, "does the video show what the prompt says"),
    "switching": Instrument(switching.measure, 64, "chunks until a new prompt holds"),
    "recall": Instrument(recall.measure, 48, "does a hidden object come back as it was"),
    "drift": Instrument(drift.measure, 2, "does a long stream stay what it was"),
    "consolidation": Instrument(consolidation.measure, 96, "what rebuilding the window costs"),
    "motion": Instrument(motion.measure, 64, "do objects move as in the true world"),
    "wording": Instrument(wording.measure, 48, "the same scenes in other words"),
    "speed": Instrument(speed.measure, 4, "frames a second, by stage", any_world=True),
    "codec": Instrument(codec.measure, 48, "held-out clips through the codec and back"),
    "external": Instrument(
        external.measure, 16, "metrics of other projects, if installed", any_world=True
    ),
}


def chosen(what: str) -> list[str]:
    """The instruments of a name: one, or all but those of other projects.

    Raises `InvalidRequestError`.
    """
    if what == ALL:
        return [name for name in INSTRUMENTS if name != "external"]
    if what in INSTRUMENTS:
        return [what]
    known = [*INSTRUMENTS, compare.WHAT, ALL]
    near = difflib.get_close_matches(what, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    raise InvalidRequestError(f"evaluate {what!r} is unknown ({hint})", param="what")


def run(
    name: str, subject: Subject, plan: Plan, out: Path, command: Sequence[str]
) -> tuple[Report, tuple[Path, Path]]:
    """Measure, then write the JSON and the picture; the report and both files.

    Raises `ConfigError` for a model that this instrument cannot measure, and
    `InvalidRequestError`, before anything is measured, for a folder that takes no file.
    """
    instrument = INSTRUMENTS[name]
    if not instrument.any_world:
        check_world(subject.preset, name)
    return _measured(lambda p: instrument.measure(subject, p), subject, plan, out, command)


def run_compare(
    subjects: Mapping[str, Subject], plan: Plan, out: Path, command: Sequence[str]
) -> tuple[Report, tuple[Path, Path]]:
    """The same for several models by name; what is written names the first as the model.

    Raises `ConfigError` for a first model without a memory, too.
    """
    for subject in subjects.values():
        check_world(subject.preset, compare.WHAT)
    first = next(iter(subjects.values()))
    return _measured(lambda p: compare.measure(subjects, p), first, plan, out, command)


def _measured(
    measure: Callable[[Plan], Report],
    subject: Subject,
    plan: Plan,
    out: Path,
    command: Sequence[str],
) -> tuple[Report, tuple[Path, Path]]:
    """What is measured so far is written as well, so that a run that is stopped is not lost."""
    claim(out)
    begun = time.perf_counter()

    def keep(report: Report) -> tuple[Path, Path]:
        origin = Origin(
            preset=subject.preset.name,
            fingerprint=subject.engine().fingerprint,
            command=shlex.join(command),
            cases=plan.cases,
            seed=plan.seed,
            seconds=time.perf_counter() - begun,
        )
        return write(report, origin, out)

    report = measure(replace(plan, so_far=keep))
    return report, keep(report)
