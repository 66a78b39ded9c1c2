"""`echo-ray evaluate WHAT`: measure the model; a table, figures as JSON and a picture each.

WHAT: following, switching, recall, drift, consolidation, motion, wording, speed, codec, external,
or all (external left out). compare puts several models side by side, each given by --model, and
the first of them also with a tier of its past taken away.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from echo_ray.commands.settings import add_settings

if TYPE_CHECKING:
    from echo_ray.config import EchoConfig
    from echo_ray.evaluation.report import Report

HELP = "measure prompt following, recall, drift, speed and more"
OUT = Path("evaluation-out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="WHAT", help="what to measure, or all")
    add_settings(parser, "model.weights=DIR")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        dest="models",
        help="for compare: a model by a name of its own; give it once for each",
    )
    parser.add_argument("--cases", type=int, help="how many; each instrument has its own number")
    parser.add_argument("--chunks", type=int, default=400, help="length of each drift stream")
    for kind, under in (("constant", "one prompt"), ("switched", "changing prompts")):
        parser.add_argument(
            f"--{kind}-streams", type=int, help=f"drift streams under {under}; --cases if not given"
        )
    parser.add_argument("--seed", type=int, default=0, help="of the cases")
    parser.add_argument("--out", type=Path, help=f"folder to write to; {OUT}/WHAT if not given")


def run(args: argparse.Namespace) -> int:
    """Measure one after the other; each one's table is printed as soon as it is there."""
    from echo_ray.config import EchoConfig, from_mapping, with_overrides
    from echo_ray.evaluation import compare, instruments
    from echo_ray.evaluation.rollout import Plan
    from echo_ray.evaluation.subject import ServedSubject, check_world
    from echo_ray.out_folder import claim

    config = from_mapping(EchoConfig, with_overrides({}, args.assignments))
    if args.what == compare.WHAT:
        return _compare(args, config)
    names = instruments.chosen(args.what)
    compare.refuse_models(args.models, args.what)
    subject = ServedSubject(config.model)
    plans = {
        name: Plan(
            cases=instruments.INSTRUMENTS[name].cases if args.cases is None else args.cases,
            seed=args.seed,
            chunks=args.chunks,
            constant_streams=args.constant_streams,
            switched_streams=args.switched_streams,
        )
        for name in names
    }
    for name in names:
        if not instruments.INSTRUMENTS[name].any_world:
            check_world(subject.preset, name)
    out = args.out or OUT / args.what
    claim(out)
    command = ["echo-ray", "evaluate", *_words(args)]
    for name, plan in plans.items():
        _print(*instruments.run(name, subject, plan, out, command))
    return 0


def _compare(args: argparse.Namespace, config: EchoConfig) -> int:
    from echo_ray.evaluation import compare, instruments
    from echo_ray.evaluation.rollout import Plan
    from echo_ray.evaluation.subject import ServedSubject

    models = compare.named_models(args.models, config.model)
    subjects = {name: ServedSubject(model) for name, model in models.items()}
    plan = Plan(cases=compare.CASES if args.cases is None else args.cases, seed=args.seed)
    out, command = args.out or OUT / args.what, ["echo-ray", "evaluate", *_words(args)]
    _print(*instruments.run_compare(subjects, plan, out, command))
    return 0


def _print(report: Report, files: Sequence[Path]) -> None:
    from echo_ray.evaluation.report import table

    print(f"\n{table(report)}\n{'  '.join(map(str, files))}", flush=True)


def _words(args: argparse.Namespace) -> list[str]:
    """The command line again, as it is written beside the figures."""
    words = [args.what, *(w for a in args.assignments for w in ("--set", a))]
    words += [w for model in args.models for w in ("--model", model)]
    if args.cases is not None:
        words += ["--cases", str(args.cases)]
    words += ["--chunks", str(args.chunks), "--seed", str(args.seed)]
    for kind in ("constant", "switched"):
        if (count := getattr(args, f"{kind}_streams")) is not None:
            words += [f"--{kind}-streams", str(count)]
    return words + (["--out", str(args.out)] if args.out else [])
