"""`echo-ray bench gpu`: the engine against the published loop, on random weights of the real size.

First the gate: the engine has to compute what our own form of the published loop does, or no speed
is told and the exit status is 1. Then pieces, the ladder of switches, decoders, state, live streams
and a profile. On a CPU, with --device cpu --preset echo-tiny, it is a dry run of all that.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

HELP = "measure the engine on a GPU, behind a gate of correctness"
OUT = Path("bench-out")
RED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("gpu",), help="what to measure")
    parser.add_argument("--preset", default="echo-infinity-1.3b", help="size of the random weights")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=10.0, help="time for all stages")
    parser.add_argument("--stages", default="all", help="some of them, with commas between")
    parser.add_argument("--seed", type=int, default=0, help="of weights and noise")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the JSON and the page")


def run(args: argparse.Namespace) -> int:
    """Tables, JSON and a page; 1 if a check failed."""
    from echo_ray.benchmark import report
    from echo_ray.benchmark.plan import check_minutes, chosen
    from echo_ray.benchmark.run import Request, benchmark, check_subject, device_of
    from echo_ray.clock import SystemClock
    from echo_ray.out_folder import claim
    from echo_ray.preset import load_preset
    from echo_ray.session.rules import check_seed

    stages, minutes = chosen(args.stages), check_minutes(args.minutes)
    check_seed(args.seed)
    device = device_of(args.device)
    preset = load_preset(args.preset)
    check_subject(preset, device)
    claim(args.out)
    request = Request(
        command=shlex.join(_words(args)), preset=preset, device=args.device, minutes=minutes,
        seed=args.seed, stages=stages,
    )  # fmt: skip
    done = benchmark(request, SystemClock())
    for line in report.lines(done):
        print(line)
    print("  ".join(str(path) for path in report.write(done, args.out)), flush=True)
    return RED if done.red else 0


def _words(args: argparse.Namespace) -> list[str]:
    """The command line again, as it is written beside the figures."""
    words = ["echo-ray", "bench", args.what, "--preset", args.preset, "--device", args.device]
    return [
        *words, "--minutes", f"{args.minutes:g}", "--stages", args.stages, "--seed", str(args.seed),
    ]  # fmt: skip
