"""The ladder: our engine in settings that differ from the one below by a single switch.

A switch that a machine does not have is a rung that says so; nothing else is left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from echo_kernels.dispatch import VARIABLE
from echo_ray.benchmark.subject import Bench, unconsolidated
from echo_ray.engine.generator import Generator
from echo_ray.errors import ConfigError
from echo_ray.model.backends import Attention, Machine, choose
from echo_ray.model.computing import use

PUBLISHED = "flash"
"""The attention that the published loop's library is closest to, where it can be had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The engine's switches."""

    attention: str
    kernels: bool = False


@dataclass(frozen=True, slots=True)
class Rung:
    """One step of the ladder; `missing` says why it cannot be taken here."""

    name: str
    setting: Setting
    exact: bool = True
    """Whether it may differ from the baseline by roundings alone."""
    missing: str = ""


def ladder(bench: Bench) -> list[Rung]:
    """Lowest first; each changes one switch of the one before it that can be taken."""
    published = first_attention(bench, (PUBLISHED, "plain"))
    setting = Setting(attention=published)
    rungs = [Rung(f"slots that stay, attention {published}", setting)]

    def climb(name: str, missing: str, **switch: object) -> None:
        nonlocal setting
        after = replace(setting, **switch)  # type: ignore[arg-type]
        rungs.append(Rung(name, after, missing=missing))
        if not missing:
            setting = after

    no_cuda = "" if bench.device.type == "cuda" else "needs CUDA"
    for name in ("cudnn", "fa3"):
        climb(f"attention {name}", refusal(bench, name), attention=name)
    climb("kernels", no_cuda, kernels=True)
    return rungs


def attention(bench: Bench, name: str) -> Attention:
    """Raises `ConfigError` where it cannot be had."""
    return choose(name, Machine.of(bench.device), bench.dtype, bench.preset.dit.head_dim)


def refusal(bench: Bench, name: str) -> str:
    """Why an attention cannot be had here; empty if it can."""
    try:
        attention(bench, name)
    except ConfigError as e:
        return e.message
    return ""


def first_attention(bench: Bench, names: Sequence[str]) -> str:
    return next(name for name in names if not refusal(bench, name))


@contextmanager
def climbed(bench: Bench, rung: Rung) -> Iterator[Generator]:
    """Our generator in a rung's setting, without points; the setting is taken back after."""
    before = os.environ.get(VARIABLE)
    modules = bench.modules
    os.environ[VARIABLE] = "" if rung.setting.kernels else "reference"
    use(modules.dit, modules.memory, attention(bench, rung.setting.attention))
    preset = unconsolidated(bench.preset)
    try:
        yield Generator(modules.dit, modules.memory, preset.cache, preset.sampler)
    finally:
        use(modules.dit, modules.memory, attention(bench, "auto"))
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
