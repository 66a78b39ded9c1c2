"""What is measured: a served model, and what can be changed about it with its weights kept.

Instruments see a `Subject` and drive the engines that it gives; they know nothing of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from echo_ray.config import ModelSection
from echo_ray.engine.build import build_engine, computing_of
from echo_ray.engine.engine import EchoEngine
from echo_ray.errors import ConfigError
from echo_ray.evaluation.variants import Variant, apply
from echo_ray.model.backends import Machine
from echo_ray.preset import CacheShape, Preset, WordTextShape, load_preset, with_codec
from echo_ray.session.chunk import Chunk
from echo_ray.session.engine_port import State, StreamShape
from echo_ray.session.snapshot import Snapshot
from echo_ray.weights.folder import WeightsFolder
from echo_ray.weights.location import weights_folder
from echo_ray.weights.modules import Modules, TextPlace, load_modules


class Measured(Protocol):
    """What instruments need of `echo_ray.session.engine_port.Engine`, and what it understood.

    A state is handed back as it came; whose it is only the engine knows.
    """

    @property
    def shape(self) -> StreamShape: ...

    @property
    def fingerprint(self) -> str: ...

    def understood(self, prompt: str) -> tuple[list[str], list[str]]:
        """The prompt's words that the model knows, and those it ignores."""
        ...

    def open(self, prompt: str, seed: int, first_frames: bytes = b"") -> State: ...

    def step(self, state: Any, prompts: Sequence[str] = ()) -> Chunk: ...

    def save(self, state: Any) -> Snapshot: ...


class Subject(Protocol):
    """One model under measurement."""

    @property
    def preset(self) -> Preset: ...

    def engine(self, variant: Variant = Variant.WHOLE, point_every: int | None = None) -> Measured:
        """The model's engine, with tiers taken away or other consolidation points if asked for.

        Raises `ConfigError` for a variant that the model cannot be.
        """
        ...


@dataclass(frozen=True, slots=True)
class ModulesSubject:
    """A model whose parts are at hand."""

    preset: Preset
    modules: Modules
    device: torch.device
    threads: int

    def engine(self, variant: Variant = Variant.WHOLE, point_every: int | None = None) -> Measured:
        preset, modules = apply(self.preset, self.modules, variant)
        cache = _with_points(preset.cache, point_every)
        return EchoEngine(replace(preset, cache=cache), modules, self.device, self.threads)


class ServedSubject:
    """The model that a configuration names: unchanged, it is the very engine that is served."""

    def __init__(self, config: ModelSection) -> None:
        self.config = config
        self._served: EchoEngine | None = None

    @property
    def preset(self) -> Preset:
        return with_codec(load_preset(self.config.preset), self.config.vae)

    def engine(self, variant: Variant = Variant.WHOLE, point_every: int | None = None) -> Measured:
        """Loaded once as it is served, and again for every change."""
        if variant is Variant.WHOLE and point_every is None:
            self._served = self._served or build_engine(self.config)
            return self._served
        folder = WeightsFolder.open(weights_folder(self.config))
        device = torch.device(self.config.device)
        place = TextPlace(device=torch.device(self.config.text_device or self.config.device))
        plan = computing_of(self.config, self.preset, Machine.of(device))
        modules = load_modules(self.preset, folder, device, place)
        preset, modules = apply(self.preset, modules, variant)
        changed = ModulesSubject(preset, plan.applied(modules), device, self.config.threads)
        return changed.engine(point_every=point_every)


def _with_points(cache: CacheShape, point_every: int | None) -> CacheShape:
    return cache if point_every is None else replace(cache, point_every=point_every)


def check_world(preset: Preset, what: str) -> None:
    """Raise `ConfigError` for a model that was not made for the world of coloured shapes."""
    if not isinstance(preset.text, WordTextShape):
        raise ConfigError(
            f"evaluate {what}: there is no detector for the videos of preset {preset.name}: "
            "colours and shapes are read back from echo-tiny's world only; evaluate speed or "
            "external, or set model.preset=echo-tiny",
            param="model.preset",
        )


def window_chunks(preset: Preset) -> int:
    """How many chunks the local window holds."""
    return preset.cache.local_frames // preset.cache.frames_per_chunk
