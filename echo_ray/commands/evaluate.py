"""`echo-ray evaluate WHAT`: measure the model; a table, figures as JSON and a picture each.

WHAT: following, switching, recall, drift, consolidation, motion, wording, speed, codec, external,
or all (external left out).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from echo_ray.commands.settings import add_settings

HELP = "measure prompt following, recall, drift, speed and more"
OUT = Path("evaluation-out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="WHAT", help="what to measure, or all")
    add_settings(parser, "model.weights=DIR")
    parser.add_argument("--cases", type=int, help="how many; each instrument has its own number")
    parser.add_argument("--chunks", type=int, default=400, help="length of each drift stream")
    parser.add_argument("--seed", type=int, default=0, help="of the cases")
    parser.add_argument("--out", type=Path, help=f"folder to write to; {OUT}/WHAT if not given")


def run(args: argparse.Namespace) -> int:
    """Measure one after the other; each one's table is printed as soon as it is there."""
    from echo_ray.config import EchoConfig, from_mapping, with_overrides
    from echo_ray.evaluation import instruments
    from echo_ray.evaluation.report import claim, table
    from echo_ray.evaluation.rollout import Plan
    from echo_ray.evaluation.subject import ServedSubject, check_world

    names = instruments.chosen(args.what)
    config = from_mapping(EchoConfig, with_overrides({}, args.assignments))
    subject = ServedSubject(config.model)
    plans = {
        name: Plan(
            cases=instruments.INSTRUMENTS[name].cases if args.cases is None else args.cases,
            seed=args.seed,
            chunks=args.chunks,
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
        report, files = instruments.run(name, subject, plan, out, command)
        print(f"\n{table(report)}\n{'  '.join(map(str, files))}", flush=True)
    return 0


def _words(args: argparse.Namespace) -> list[str]:
    """The command line again, as it is written beside the figures."""
    words = [args.what, *(w for a in args.assignments for w in ("--set", a))]
    if args.cases is not None:
        words += ["--cases", str(args.cases)]
    words += ["--chunks", str(args.chunks), "--seed", str(args.seed)]
    return words + (["--out", str(args.out)] if args.out else [])
