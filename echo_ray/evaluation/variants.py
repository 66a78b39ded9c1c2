"""The same weights with a tier of their past taken away, for ablations.

Only what a served model is built of is exchanged: the preset's cache, the memory encoder, the
transformer's view of the cache. The engine is the shipped one and knows nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from echo_kernels import Slots
from echo_ray.errors import ConfigError
from echo_ray.model.attention import KVCall
from echo_ray.model.dit import DiT, Modulations, PromptKV
from echo_ray.model.memory import MemoryEncoder
from echo_ray.model.state_dict import load_strict
from echo_ray.preset import Preset
from echo_ray.weights.modules import Modules


class Variant(StrEnum):
    """Which of the tiers a model sees; the value is how a table names it."""

    WHOLE = "sink + memory + window"
    FROZEN = "memory frozen at its start"
    SINK = "sink + window"
    WINDOW = "window only"


class FrozenMemory(MemoryEncoder):
    """The trained encoder whose query state never changes: what it shows holds no past."""

    def update(self, q_BMC: Tensor, k_BEHD: Tensor, v_BEHD: Tensor) -> Tensor:
        return q_BMC


@dataclass(frozen=True, slots=True)
class SinklessCall:
    """A cache's view without its first frames, once others are held beside them."""

    inner: KVCall
    sink_tokens: int

    def slots(self, layer: int) -> Slots:
        slots = self.inner.slots(layer)
        keys, values = slots.seen_keys_BMHD, slots.seen_values_BMHD
        # While all that is presented is the call's own, the sink is the present and not the past.
        if keys.shape[1] <= slots.query_rope_NP.shape[0]:
            return slots
        sink = self.sink_tokens
        return replace(slots, seen_keys_BMHD=keys[:, sink:], seen_values_BMHD=values[:, sink:])


class SinklessDiT(DiT):
    """The trained transformer that never looks at the sink; for caches without a memory tier."""

    sink_tokens = 0

    def forward(
        self, x_BFCHW: Tensor, modulations: Modulations, prompt: PromptKV, call: KVCall
    ) -> Tensor:
        return super().forward(x_BFCHW, modulations, prompt, self._without_sink(call))

    def remember(
        self, x_BFCHW: Tensor, modulations: Modulations, prompt: PromptKV, call: KVCall
    ) -> None:
        super().remember(x_BFCHW, modulations, prompt, self._without_sink(call))

    def _without_sink(self, call: KVCall) -> SinklessCall:
        return SinklessCall(call, self.sink_tokens)


def apply(preset: Preset, modules: Modules, variant: Variant) -> tuple[Preset, Modules]:
    """Preset and modules of a variant; weights are shared, not copied.

    Raises `ConfigError` for a variant without a tier that the preset has not got anyway.
    """
    if variant is Variant.WHOLE:
        return preset, modules
    if modules.memory is None or preset.cache.memory is None:
        raise ConfigError(f"preset {preset.name} has no memory, so there is no {variant.value!r}")
    digest = f"{modules.digest} {variant.value}"
    if variant is Variant.FROZEN:
        with torch.device("meta"):
            frozen = FrozenMemory(preset.dit, preset.cache.memory)
        load_strict(frozen, modules.memory.state_dict(), "memory")
        memory = frozen.eval().requires_grad_(requires_grad=False)
        return preset, replace(modules, memory=memory, digest=digest)
    preset = replace(preset, cache=replace(preset.cache, memory=None))
    modules = replace(modules, memory=None, digest=digest)
    if variant is Variant.WINDOW:
        modules = replace(modules, dit=_sinkless(preset, modules.dit))
    return preset, modules


def _sinkless(preset: Preset, dit: DiT) -> DiT:
    with torch.device("meta"):
        blind = SinklessDiT(preset.dit)
    load_strict(blind, dit.state_dict(), "dit")
    blind.sink_tokens = preset.cache.sink_frames * preset.dit.tokens_per_frame
    return blind.eval().requires_grad_(requires_grad=False)
