"""The ladder: our engine in settings that differ from the one below by a single switch.

A switch that a machine does not have is a rung that says so; nothing else is left out.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from echo_kernels.dispatch import VARIABLE
from echo_ray.benchmark.random_weights import random_modules
from echo_ray.benchmark.subject import Bench, unconsolidated
from echo_ray.config import ModelSection
from echo_ray.engine.aside import HostAside, aside_of
from echo_ray.engine.build import Plan, computing_of
from echo_ray.engine.generator import Generator
from echo_ray.engine.graph_check import CheckedRecorder
from echo_ray.engine.graphs import CudaRecorder, Recorder
from echo_ray.errors import ConfigError
from echo_ray.model.attention import Attend
from echo_ray.model.backends import Machine
from echo_ray.model.computing import Precision
from echo_ray.weights.modules import Modules

PUBLISHED = "flash"
"""The attention that the published loop's library is closest to, where it can be had."""


ALWAYS_ON = {
    "context pass ends at the last layer's keys and values": "the pass has no other form; what "
    "follows them would be computed and thrown away",
    "modulations and text projections are computed once": "they are values that every forward "
    "takes, kept by timestep and by prompt",
    "rotated keys stay rotated; slots move once a chunk": "the window has no other layout; R0 has "
    "the other one",
    "noise and indices come without a wait": "the host computes both and reads nothing",
}
"""What the engine does that no switch turns off, so that no rung tells what it gains, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The engine's switches."""

    attention: str
    kernels: bool = False
    graphs: bool = False
    beside: bool = False
    """The memory is updated beside a chunk's first forward."""
    precision: str = Precision.EXACT.value


@dataclass(frozen=True, slots=True)
class Rung:
    """One step of the ladder; `missing` says why it cannot be taken here."""

    name: str
    setting: Setting
    missing: str = ""

    @property
    def exact(self) -> bool:
        """Whether it may differ from the baseline by roundings of the model's own kind alone."""
        return self.setting.precision == Precision.EXACT


def ladder(bench: Bench) -> list[Rung]:
    """Lowest first; each changes one switch of the one before it that can be taken.

    Where a chunk is decoded, the one switch that forwards do not show, is `lane_rung`'s.
    """
    setting = Setting(attention=published(bench))
    rungs = [Rung(f"slots that stay, attention {setting.attention}", setting)]

    def climb(name: str, after: Setting, missing: str = "") -> None:
        nonlocal setting
        missing = missing or refusal(bench, after)
        rungs.append(Rung(name, after, missing))
        if not missing:
            setting = after

    for name in ("fa2", "cudnn", "fa3"):
        climb(f"attention {name}", replace(setting, attention=name))
    climb("kernels", replace(setting, kernels=True), "needs CUDA" if bench.dry else "")
    climb("graphs, their discipline checked" if bench.dry else "graphs",
          replace(setting, graphs=True))  # fmt: skip
    climb("memory updated beside the first forward", replace(setting, beside=True),
          "needs CUDA, a CPU has one lane" if bench.dry else "")  # fmt: skip
    for precision in (Precision.FP8, Precision.FP8_ATTENTION8):
        # 8 bits choose their own attention: few libraries have one.
        own = "auto" if precision is Precision.FP8_ATTENTION8 else setting.attention
        # A check of what a graph would refuse is slow, and done once.
        graphs = not bench.dry
        after = replace(setting, precision=precision.value, attention=own, graphs=graphs)
        climb(precision.value, after)
    return rungs


def published(bench: Bench) -> str:
    return next(n for n in (PUBLISHED, "plain") if not refusal(bench, Setting(attention=n)))


def best_exact(bench: Bench) -> Rung:
    """With every switch that changes no more than roundings."""
    return [rung for rung in ladder(bench) if rung.exact and not rung.missing][-1]


def best_seen(bench: Bench) -> Rung:
    """As `best_exact`; in a dry run eager, for a check of what a graph would refuse is slow, and
    hides what it checks."""
    rung = best_exact(bench)
    if not bench.dry:
        return rung
    return replace(rung, setting=replace(rung.setting, graphs=False))


def plan_of(bench: Bench, setting: Setting) -> Plan:
    """Raises `ConfigError` where it cannot be had."""
    section = ModelSection(attention=setting.attention, precision=setting.precision)
    return computing_of(section, bench.preset, Machine.of(bench.device))


def attention(bench: Bench, name: str) -> Attend:
    """Raises `ConfigError` where it cannot be had."""
    return plan_of(bench, Setting(attention=name)).attention.attend


def refusal(bench: Bench, setting: Setting) -> str:
    """Why a setting cannot be had here; empty if it can."""
    try:
        plan_of(bench, setting)
    except ConfigError as e:
        return e.message
    return ""


def modules_of(bench: Bench, setting: Setting) -> Modules:
    """Modules that compute so. Weights are rounded to 8 bits for good: those are drawn anew."""
    modules = bench.modules
    if setting.precision != Precision.EXACT:
        modules = random_modules(bench.preset, bench.device, bench.seed)
    return plan_of(bench, setting).applied(modules)


@contextmanager
def kernels_chosen(*, kernels: bool) -> Iterator[None]:
    """The environment's choice of kernels or truths, for a while."""
    before = os.environ.pop(VARIABLE, None)
    if not kernels:
        os.environ[VARIABLE] = "reference"
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


@contextmanager
def climbed(bench: Bench, rung: Rung) -> Iterator[Generator]:
    """Our generator in a rung's setting, without points; its memory is given back after."""
    modules, cache = modules_of(bench, rung.setting), unconsolidated(bench.preset).cache
    recorder = recorder_of(bench) if rung.setting.graphs else None
    with kernels_chosen(kernels=rung.setting.kernels):
        yield Generator(
            modules.dit, modules.memory, cache, bench.preset.sampler,
            recorder=recorder, arenas_kept=0,
            aside=aside_of(bench.device) if rung.setting.beside else HostAside(),
        )  # fmt: skip
    del modules, recorder
    free(bench)


def recorder_of(bench: Bench) -> Recorder:
    """Of graphs, or on a CPU of what a graph would refuse."""
    return CheckedRecorder() if bench.dry else CudaRecorder()


def free(bench: Bench) -> None:
    """Let go of what is not reachable any more: states hold gigabytes."""
    gc.collect()
    if not bench.dry:
        torch.cuda.empty_cache()
