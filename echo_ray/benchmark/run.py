"""All stages in their order, each within its time, and no speed behind a red gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeAlias

import torch
from tqdm import tqdm

from echo_ray.benchmark import (
    stage_decoders,
    stage_gate,
    stage_ladder,
    stage_micro,
    stage_profile,
    stage_state,
    stage_streams,
)
from echo_ray.benchmark.plan import DRY, FULL, Budget, Plan
from echo_ray.benchmark.report import Run
from echo_ray.benchmark.result import Outcome
from echo_ray.benchmark.subject import Bench, running
from echo_ray.benchmark.timing import Timer
from echo_ray.clock import Clock
from echo_ray.errors import ConfigError, DeviceMissing, EchoError, MemoryShort
from echo_ray.preset import Preset

Stage: TypeAlias = Callable[[Bench, Outcome], None]
RUNNERS: Mapping[str, Stage] = {
    "machine": stage_gate.machine,
    "gate": stage_gate.parity,
    "micro": stage_micro.run,
    "ladder": stage_ladder.run,
    "decoders": stage_decoders.run,
    "state": stage_state.run,
    "streams": stage_streams.run,
    "profile": stage_profile.run,
}


DRY_SIZE = 2**23
"""Layers x width x width of the largest model that a CPU gets through in a dry run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for."""

    command: str
    preset: Preset
    device: str
    minutes: float
    seed: int
    stages: Sequence[str]
    plan: Plan | None = None
    """None: the full one on a GPU, the dry one on a CPU."""


def device_of(name: str) -> torch.device:
    """Raises `DeviceMissing` for CUDA where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceMissing(
            "--device cuda: PyTorch sees no CUDA device and the benchmark needs 1; for a dry run "
            "of every stage, without any figure that means something, give --device cpu "
            "--preset echo-tiny",
            param="device",
        )
    return torch.device(name)


def check_subject(preset: Preset, device: torch.device) -> None:
    """Raise `ConfigError` for a preset that the baseline does not know or a CPU is too slow for."""
    if preset.cache.policy != "echo":
        raise ConfigError(
            f"--preset {preset.name}: the baseline has the cache policy echo, not "
            f"{preset.cache.policy}; give echo-infinity-1.3b or echo-tiny",
            param="preset",
        )
    layers = preset.dit.num_layers * preset.dit.dim**2
    if device.type == "cpu" and layers > DRY_SIZE:
        raise ConfigError(
            f"--preset {preset.name}: {layers:,} (layers x width x width) is too large for a dry "
            f"run on a CPU, which takes at most {DRY_SIZE:,}; give --preset echo-tiny",
            param="preset",
        )


def benchmark(
    request: Request, clock: Clock, runners: Mapping[str, Stage] = RUNNERS, *, bar: bool = True
) -> Run:
    """Run the stages. What fails or does not fit is said in its outcome; the rest goes on.

    Raises `DeviceMissing` and `ConfigError` before anything runs.
    """
    device = device_of(request.device)
    check_subject(request.preset, device)
    budget = Budget(request.minutes, request.stages, clock)
    before = stage_gate.device_facts(device) | stage_gate.versions()
    outcomes: list[Outcome] = []
    with (
        running(threads=1 if device.type == "cpu" else None),
        tqdm(total=len(request.stages), unit="stage", disable=None if bar else True) as progress,
    ):
        progress.set_description("weights")
        plan = request.plan or (DRY if device.type == "cpu" else FULL)
        bench = _bench(request, plan, budget, progress.set_description)
        for name in request.stages:
            progress.set_description(name)
            outcomes.append(_stage(name, runners[name], bench, outcomes))
            progress.update()
    return Run(
        command=request.command,
        when=datetime.fromtimestamp(clock.wall(), UTC).strftime("%Y-%m-%d %H:%M:%S"),
        settings={
            "preset": request.preset.name, "dtype": request.preset.dtype, "seed": request.seed,
            "minutes": request.minutes, "stages": list(request.stages),
        },
        device=before,
        after=stage_gate.device_facts(device),
        dry=bench.dry,
        frames_per_chunk=request.preset.frames_per_chunk,
        outcomes=outcomes,
    )  # fmt: skip


def _bench(request: Request, plan: Plan, budget: Budget, say: Callable[[str], None]) -> Bench:
    """With its weights drawn. Raises `MemoryShort` where the device has no room for them."""
    device = torch.device(request.device)
    try:
        return Bench(request.preset, device, request.seed, plan, budget, Timer(device), say)
    except torch.OutOfMemoryError as e:
        raise MemoryShort(
            f"--preset {request.preset.name}: its weights do not fit onto {device}: "
            f"{str(e).splitlines()[0]}; free memory there, or give a smaller preset",
            param="preset",
        ) from e


def _stage(name: str, stage: Stage, bench: Bench, before: Sequence[Outcome]) -> Outcome:
    out, start_s = Outcome(name), bench.budget.elapsed_s()
    if any(o.red or o.status == "failed" for o in before if o.stage == "gate"):
        out.status, out.reason = "skipped", "the gate is red"
        return out
    if name != "gate" and (why := bench.budget.refusal(name, 1.0)):
        out.status, out.reason = "skipped", why
        return out
    try:
        stage(bench, out)
    except MemoryShort as e:
        out.status, out.reason = "skipped", e.message
    except torch.OutOfMemoryError as e:
        out.status, out.reason = "skipped", str(e).splitlines()[0]
    except (EchoError, RuntimeError, ValueError) as e:
        out.status, out.reason = "failed", f"{type(e).__name__}: {e}".splitlines()[0]
    out.seconds = bench.budget.elapsed_s() - start_s
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    return out
