"""The learned memory: what an update does to the state, with its gate and without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small import small_preset

from echo_ray.errors import WeightsError
from echo_ray.model.memory import MemoryEncoder
from echo_ray.model.state_dict import load_strict
from echo_ray.preset import MemoryShape, Preset
from echo_ray.weights.modules import build_modules


def with_gate(gate: bool) -> Preset:
    preset = small_preset()
    assert preset.cache.memory is not None
    memory = replace(preset.cache.memory, gate=gate)
    return replace(preset, cache=replace(preset.cache, memory=memory))


def encoder(gate: bool) -> MemoryEncoder:
    torch.manual_seed(3)
    memory = build_modules(with_gate(gate)).memory
    assert memory is not None
    return memory


def evicted() -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(4)
    key, value = torch.randn(2, 1, 12, 2, 8, generator=source)
    return key, value


def test_a_gate_is_there_unless_the_preset_says_otherwise() -> None:
    assert MemoryShape().gate
    gated, plain = (set(encoder(gate).state_dict()) for gate in (True, False))
    assert gated - plain == {"gate_linear.weight", "gate_linear.bias"}
    assert plain < gated


@torch.no_grad()
def test_without_a_gate_the_candidate_is_the_new_state() -> None:
    gated, plain = encoder(True), encoder(False)
    load_strict(plain, {k: v for k, v in gated.state_dict().items() if "gate" not in k}, "memory")
    state = gated.initial(1)
    assert gated.gate_linear is not None
    torch.nn.init.zeros_(gated.gate_linear.weight)
    candidate = plain.update(state, *evicted())
    torch.nn.init.constant_(gated.gate_linear.bias, -100.0)
    assert torch.allclose(gated.update(state, *evicted()), candidate)
    torch.nn.init.constant_(gated.gate_linear.bias, 100.0)
    assert torch.allclose(gated.update(state, *evicted()), state)
    assert not torch.allclose(candidate, state)


def test_weights_with_a_gate_do_not_fit_one_without_and_the_other_way_round() -> None:
    gated, plain = encoder(True), encoder(False)
    with pytest.raises(WeightsError, match=r"2 surplus: gate_linear\.bias, gate_linear\.weight"):
        load_strict(plain, gated.state_dict(), "memory")
    with pytest.raises(WeightsError, match=r"2 missing: gate_linear\.bias, gate_linear\.weight"):
        load_strict(gated, plain.state_dict(), "memory")
