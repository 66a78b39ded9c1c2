"""The loop that all stages share: budget, learning rate, progress line, checkpoints, curves.

Randomness of a step is a function of (seed, stage, step), so a resumed run draws what an
uninterrupted one would have drawn and no generator state has to be kept.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from echo_ray.errors import WeightsError
from echo_ray.training.budget import Budget, learning_rate_factor
from echo_ray.training.group import process_rank, refuse_minutes, wait_for_all
from echo_ray.training.pictures import curve_picture

CHECKPOINT = "checkpoint.pt"
SMOOTH = 0.97
"""Share of the past in the losses that are shown and drawn."""
EVERY = 10
"""Steps between two points of a curve; more where a loss is measured less often."""
TICKS = 1000
"""Length of the progress bar of a stage that ends by time."""


@dataclass(frozen=True)
class StepRandom:
    """The two generators of one step, which are always on the host, and its number."""

    data: np.random.Generator
    noise: torch.Generator
    step: int


def step_random(seed: int, stage: str, step: int, rank: int = 0) -> StepRandom:
    """Generators that depend on nothing but their arguments; each process has its own."""
    place = [seed, zlib.crc32(stage.encode()), step, *([rank] if rank else [])]
    words = np.random.SeedSequence(place).generate_state(2)
    noise = torch.Generator().manual_seed(int(words[1]))
    return StepRandom(np.random.default_rng(int(words[0])), noise, step)


class Stage(Protocol):
    """What a stage gives to the loop."""

    name: str

    def train_step(self, random: StepRandom, progress: float) -> dict[str, float]:
        """One change of the weights; what it measured, the most telling first."""
        ...

    def optimizers(self) -> Iterable[torch.optim.Optimizer]: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...

    def at_checkpoint(self, out: Path, step: int) -> None: ...


@dataclass
class Progress:
    """How far a stage has come; saved with it."""

    step: int = 0
    elapsed_s: float = 0.0
    smooth: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """By name: at which step the smoothed loss was what."""

    def take(self, losses: dict[str, float], elapsed_s: float) -> None:
        """Count one more step."""
        self.step += 1
        self.elapsed_s += elapsed_s
        for name, loss in losses.items():
            was = self.smooth.get(name, loss)
            self.smooth[name] = SMOOTH * was + (1 - SMOOTH) * loss
            points = self.curves.setdefault(name, [])
            if not points or self.step // EVERY > points[-1][0] // EVERY:
                points.append((self.step, self.smooth[name]))

    def points(self) -> dict[str, list[tuple[int, float]]]:
        """The curves up to now, the last step included."""
        now = {name: [(self.step, loss)] for name, loss in self.smooth.items()}
        return {
            name: points if points[-1][0] == self.step else points + now[name]
            for name, points in self.curves.items()
        }


def run_stage(
    stage: Stage,
    budget: Budget,
    seed: int,
    out: Path,
    *,
    resume: bool,
    checkpoint_every_s: float,
    schedule: str = "cosine",
) -> Progress:
    """Train until the budget is used up; the checkpoint in `out` can always be resumed from.

    Whatever happens to the run between two checkpoints, going on from the last one gives the bits
    that an uninterrupted run would have had, if the budget counts steps.
    """
    refuse_minutes(budget.minutes)
    out.mkdir(parents=True, exist_ok=True)
    file = out / CHECKPOINT
    groups = [g for o in stage.optimizers() for g in o.param_groups]
    base = [g["lr"] for g in groups]
    progress = _load(stage, file) if resume and file.exists() else Progress()
    groups = [g for o in stage.optimizers() for g in o.param_groups]
    rank = process_rank()
    last_saved = last = time.monotonic()
    timed = budget.minutes is not None
    total, done = TICKS if timed else budget.steps, _ticks(budget, progress)
    bar = tqdm(total=total, initial=done, desc=stage.name, mininterval=5.0, disable=rank > 0)
    while (share := budget.progress(progress.step, progress.elapsed_s)) < 1.0:
        for group, lr in zip(groups, base, strict=True):
            group["lr"] = lr * learning_rate_factor(share, schedule)
        losses = stage.train_step(step_random(seed, stage.name, progress.step, rank), share)
        now = time.monotonic()
        progress.take(losses, now - last)
        last = now
        shown = {name: f"{loss:.4f}" for name, loss in progress.smooth.items()}
        bar.set_postfix({"step": str(progress.step), **shown}, refresh=False)
        bar.update(_ticks(budget, progress) - bar.n)
        if now - last_saved > checkpoint_every_s:
            _save(stage, progress, out)
            last_saved = last = time.monotonic()
    bar.close()
    _save(stage, progress, out)
    wait_for_all()
    return progress


def _ticks(budget: Budget, progress: Progress) -> int:
    total = budget.steps if budget.minutes is None else TICKS
    return int(total * budget.progress(progress.step, progress.elapsed_s))


def _save(stage: Stage, progress: Progress, out: Path) -> None:
    if process_rank():
        return
    body = {
        "stage": stage.state(),
        "optimizers": [o.state_dict() for o in stage.optimizers()],
        "progress": vars(progress),
    }
    file = out / CHECKPOINT
    part = file.with_suffix(".part")
    torch.save(body, part)
    part.replace(file)
    curves = {
        name: {"step": [s for s, _ in points], "loss": [x for _, x in points]}
        for name, points in progress.points().items()
    }
    (out / "curves.json").write_text(json.dumps(curves), encoding="utf-8")
    curve_picture(progress.points(), out / "curves.png")
    stage.at_checkpoint(out, progress.step)


def _load(stage: Stage, file: Path) -> Progress:
    try:
        body = torch.load(file, weights_only=True, map_location="cpu")
        stage.restore(body["stage"])
        for optimizer, state in zip(stage.optimizers(), body["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        return Progress(**body["progress"])
    except (RuntimeError, KeyError, ValueError, TypeError, EOFError) as e:
        raise WeightsError(f"{file}: cannot be resumed from: {e}; start without --resume") from e
