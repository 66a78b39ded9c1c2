"""The loop that both stages share: budget, learning rate, progress line, checkpoints, curve.

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
from echo_ray.training.recipe import Budget, learning_rate_factor


@dataclass(frozen=True)
class StepRandom:
    """The two generators of one step."""

    data: np.random.Generator
    noise: torch.Generator


def step_random(seed: int, stage: str, step: int) -> StepRandom:
    """Generators that depend on nothing but their arguments."""
    words = np.random.SeedSequence([seed, zlib.crc32(stage.encode()), step]).generate_state(2)
    noise = torch.Generator().manual_seed(int(words[1]))
    return StepRandom(np.random.default_rng(int(words[0])), noise)


class Stage(Protocol):
    """What a stage gives to the loop."""

    name: str

    def train_step(self, random: StepRandom, progress: float) -> float: ...

    def optimizers(self) -> Iterable[torch.optim.Optimizer]: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...

    def at_checkpoint(self, out: Path, step: int) -> None: ...


@dataclass
class Progress:
    """How far a stage has come; saved with it."""

    step: int = 0
    elapsed_s: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)


def run_stage(
    stage: Stage, budget: Budget, seed: int, out: Path, *, resume: bool, checkpoint_every_s: float
) -> Progress:
    """Train until the budget is used up; `out/<stage>.pt` always holds a resumable state."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{stage.name}.pt"
    progress = _load(stage, file) if resume and file.exists() else Progress()
    base = [g["lr"] for o in stage.optimizers() for g in o.param_groups]
    base = [g.get("initial_lr", lr) for g, lr in zip(_groups(stage), base, strict=True)]
    mean, last_saved, last = None, time.monotonic(), time.monotonic()
    timed = budget.minutes is not None
    bar = tqdm(total=1000 if timed else budget.steps, desc=stage.name, mininterval=5.0)
    while (share := budget.progress(progress.step, progress.elapsed_s)) < 1.0:
        factor = learning_rate_factor(share)
        for group, lr in zip(_groups(stage), base, strict=True):
            group["initial_lr"], group["lr"] = lr, lr * factor
        loss = stage.train_step(step_random(seed, stage.name, progress.step), share)
        mean = loss if mean is None else 0.97 * mean + 0.03 * loss
        now = time.monotonic()
        progress.elapsed_s, last = progress.elapsed_s + now - last, now
        progress.step += 1
        if progress.step % 10 == 0:
            progress.losses.append((progress.step, mean))
        bar.n = int(1000 * budget.progress(progress.step, progress.elapsed_s)) if timed else 0
        bar.n = bar.n or (0 if timed else progress.step)
        bar.set_postfix(step=progress.step, loss=f"{mean:.4f}", refresh=False)
        bar.update(0)
        if now - last_saved > checkpoint_every_s:
            _save(stage, progress, file, out)
            last_saved = last = time.monotonic()
    bar.close()
    _save(stage, progress, file, out)
    return progress


def _groups(stage: Stage) -> list[dict[str, Any]]:
    return [g for o in stage.optimizers() for g in o.param_groups]


def _save(stage: Stage, progress: Progress, file: Path, out: Path) -> None:
    body = {
        "stage": stage.state(),
        "optimizers": [o.state_dict() for o in stage.optimizers()],
        "step": progress.step,
        "elapsed_s": progress.elapsed_s,
        "losses": progress.losses,
    }
    part = file.with_suffix(".part")
    torch.save(body, part)
    part.replace(file)
    curve = {"step": [s for s, _ in progress.losses], "loss": [x for _, x in progress.losses]}
    (out / f"{stage.name}_loss.json").write_text(json.dumps(curve), encoding="utf-8")
    stage.at_checkpoint(out, progress.step)


def _load(stage: Stage, file: Path) -> Progress:
    try:
        body = torch.load(file, weights_only=True)
        stage.restore(body["stage"])
        for optimizer, state in zip(stage.optimizers(), body["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError, EOFError) as e:
        raise WeightsError(f"{file}: cannot be resumed from: {e}; start without --resume") from e
    return Progress(body["step"], body["elapsed_s"], [(s, x) for s, x in body["losses"]])
