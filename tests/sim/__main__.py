"""python -m sim --seed 0 --steps 100000 --jobs 2     (from tests/; or `make sim`)

Runs seeds and sums them up; one alone prints its whole log. Ends with 1 if any seed failed.
"""

from __future__ import annotations

import argparse
import sys
import time

from sim import account
from sim.plans import plan_of
from sim.scenario import run


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="sim", description=__doc__)
    parser.add_argument("--seed", type=_count, default=0, help="the first seed")
    parser.add_argument("--steps", type=_positive, default=100_000, help="how many seeds")
    parser.add_argument("--jobs", type=_positive, default=account.cores(), help="processes")
    asked = parser.parse_args()
    if asked.steps == 1:
        return _one(asked.seed)
    began_s = time.monotonic()
    total = account.run_all(asked.seed, asked.steps, asked.jobs)
    sys.stdout.write(account.summary(total, time.monotonic() - began_s) + "\n")
    if total.failures:
        sys.stdout.write("\n" + account.failures(total) + "\n")
    return 1 if total.failures else 0


def _one(seed: int) -> int:
    plan = plan_of(seed)
    total = account.account_of([seed])
    sys.stdout.write(f"seed {seed}, {plan}\n")
    if total.failures:
        sys.stdout.write(total.failures[seed] + "\n")
        return 1
    sys.stdout.write("\n".join(run(seed, plan).world.log) + "\n")
    sys.stdout.write(account.summary(total, 0.0) + "\n")
    return 0


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
