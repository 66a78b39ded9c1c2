"""`echo-ray train --config FILE`: carry out recipes, one stage each, resumable at any time.

A recipe is a TOML file, a folder of them, or the name of a packaged one: codec, teacher, pretrain,
fewstep, streaming, ablations (one change of the memory each), or smoke, which is all stages in two
minutes. Every recipe leaves a folder below --out with its checkpoint, weights that can be served,
curves and samples.
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "train a model by a recipe, stage by stage"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", nargs="+", required=True, metavar="FILE", help="recipes, in their order"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="change a value of the recipes"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/echo-tiny"), help="default: runs/echo-tiny"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    parser.add_argument(
        "--minutes", type=float, help="end each stage after so long instead of its steps"
    )


def run(args: argparse.Namespace) -> int:
    """0 when every stage has run to its end."""
    from echo_ray.training.train import train

    done = train(
        args.config, args.out, assignments=args.set, resume=args.resume, minutes=args.minutes
    )
    for progress in done:
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in progress.smooth.items())
        print(f"{progress.step} steps, {progress.elapsed_s:.0f} s, {losses}")
    return 0
