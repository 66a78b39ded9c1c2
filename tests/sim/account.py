"""What came of many seeds: run them over all cores, add them up, print the ones that failed."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from sim.ledger import Breach
from sim.plans import plan_of
from sim.scenario import run

CHUNK = 50
"""Seeds that a worker runs in one go."""
FAILURES_SHOWN = 3


@dataclass(slots=True)
class Account:
    """Sums over seeds."""

    seeds: int = 0
    virtual_s: float = 0.0
    acts: int = 0
    worst_stall_s: float = 0.0
    worst_seed: int | None = None
    faults: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    plans: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)
    """By seed, what broke and the log up to there."""

    def add(self, other: Account) -> None:
        """Take in what came of other seeds."""
        self.seeds += other.seeds
        self.virtual_s += other.virtual_s
        self.acts += other.acts
        self.faults += other.faults
        self.counts += other.counts
        self.plans += other.plans
        self.failures |= other.failures
        if other.worst_stall_s > self.worst_stall_s:
            self.worst_stall_s, self.worst_seed = other.worst_stall_s, other.worst_seed


def account_of(seeds: Iterable[int]) -> Account:
    """Run these seeds, each with its plan."""
    total = Account()
    for seed in seeds:
        plan = plan_of(seed)
        one = Account(seeds=1, plans=Counter([plan.name]))
        try:
            cluster = run(seed, plan)
        except Exception as error:
            what = "breach" if isinstance(error, Breach) else "the simulation itself failed"
            notes = "\n".join(getattr(error, "__notes__", ()))
            one.failures[seed] = f"{notes}\n{what}: {error!r}"
        else:
            one.virtual_s, one.acts = cluster.world.now_s, cluster.world.acts
            one.faults, one.counts = cluster.faults, cluster.ledger.counts
            one.worst_stall_s, one.worst_seed = cluster.worst_stall_s(), seed
        total.add(one)
    return total


def run_all(first: int, count: int, jobs: int) -> Account:
    """Run `count` seeds from `first` on in `jobs` processes, telling how far it is."""
    chunks = [
        range(at, min(at + CHUNK, first + count)) for at in range(first, first + count, CHUNK)
    ]
    total, began_s, told_s = Account(), time.monotonic(), 0.0
    for part in _parts(chunks, jobs):
        total.add(part)
        now_s = time.monotonic()
        if now_s - told_s >= 1 or total.seeds == count:
            told_s = now_s
            _progress(total, count, now_s - began_s)
    sys.stderr.write("\n")
    return total


def _parts(chunks: list[range], jobs: int) -> Iterator[Account]:
    if jobs == 1:
        yield from map(account_of, chunks)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(account_of, chunks)


def _progress(total: Account, count: int, took_s: float) -> None:
    left_s = took_s / total.seeds * (count - total.seeds)
    failed = f", {len(total.failures)} failed" if total.failures else ""
    sys.stderr.write(
        f"\r{total.seeds:,} of {count:,} seeds{failed}; {total.seeds / took_s:.0f} per second, "
        f"{left_s / 60:.1f} minutes left   "
    )
    sys.stderr.flush()


def summary(total: Account, took_s: float) -> str:
    """What was run, and what came of it."""
    counts = total.counts
    worst = "none" if total.worst_seed is None else f"seed {total.worst_seed}"
    lines = [
        f"seeds          {total.seeds:,} in {took_s / 60:.1f} minutes: {_named(total.plans)}",
        f"virtual hours  {total.virtual_s / 3600:,.1f}, {total.acts:,} events",
        f"faults         {sum(total.faults.values()):,}: {_named(total.faults)}",
        f"chunks         {counts.pop('commits', 0):,} committed, "
        f"{counts.pop('deliveries', 0):,} delivered",
        f"switches       {counts.pop('switches', 0):,} acknowledged",
        f"migrations     {counts.pop('moves', 0):,} planned and made, "
        f"{counts.pop('moves that failed', 0):,} called off",
        f"also           {_named(counts)}",
        f"worst stall    {total.worst_stall_s:.2f} s with a buffer of 2 s ({worst})",
        f"breaches       {len(total.failures)}",
    ]
    return "\n".join(lines)


def failures(total: Account) -> str:
    """The logs of the first seeds that failed, each with the command that replays it."""
    shown = sorted(total.failures.items())[:FAILURES_SHOWN]
    parts = [f"seed {seed}\n{text}\nagain: {again(seed)}\n" for seed, text in shown]
    hidden = sorted(total.failures)[FAILURES_SHOWN:]
    if hidden:
        parts.append(f"failed as well: {', '.join(map(str, hidden[:50]))}")
    return "\n".join(parts)


def again(seed: int) -> str:
    """The command that replays exactly this seed and prints its log."""
    return f"make sim SEED={seed} STEPS=1"


def cores() -> int:
    return os.cpu_count() or 1


def _named(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.most_common())
