"""A stream whose every op is a kernel: chunks, evictions, memory, a switch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small import small_preset

from echo_kernels import dispatch, fallbacks
from echo_kernels.launch import Kernel
from echo_ray.engine.generator import Generator, LatentState
from echo_ray.engine.noise import gaussian
from echo_ray.model.backends import PLAIN
from echo_ray.model.computing import Precision, use
from echo_ray.weights.modules import build_modules

CHUNKS = 6
"""The fifth is the first to evict, the sixth sees the memory from its first call on."""


def rollout(
    chunks: int = CHUNKS, precision: Precision = Precision.EXACT
) -> tuple[torch.Tensor, LatentState]:
    """One token a frame, for the interpreter takes a millisecond a program."""
    preset = small_preset((1000,), point_every=0)
    preset = replace(preset, dit=replace(preset.dit, latent_height=2, latent_width=2))
    torch.manual_seed(1)
    modules = build_modules(preset)
    use(modules.dit, modules.memory, PLAIN, precision)
    generator = Generator(modules.dit.eval(), modules.memory, preset.cache, preset.sampler)
    state = generator.start(modules.text.encode("a red ball"))
    clean = [
        generator.generate(state, lambda c, s: gaussian(1, c, s, (1, 3, 4, 2, 2)))
        for _ in range(chunks)
    ]
    generator.switch(state, modules.text.encode("a blue square"))
    return torch.cat(clean, dim=1), state


def noted(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the kernels that are launched from here on."""
    launched: set[str] = set()
    launch = Kernel.launch

    def noting(self: Kernel, *args: Any, **constants: Any) -> None:
        launched.add(self.function.__name__)
        launch(self, *args, **constants)

    monkeypatch.setattr(Kernel, "launch", noting)
    return launched


@pytest.mark.usefixtures("triton")
def test_a_stream_of_kernels_is_the_stream_of_truths(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, true = rollout()
    launched = noted(monkeypatch)
    monkeypatch.setattr(dispatch, "on_device", lambda tensors: True)
    found, state = rollout()
    assert fallbacks() == {}
    assert launched == {
        "chunk_advance_kernel", "layernorm_modulate_kernel", "memory_gate_blend_kernel",
        "place_memory_kernel", "qk_norm_rope_write_kernel", "residual_norm_kernel",
        "rms_norm_kernel",
    }  # fmt: skip
    assert torch.allclose(found, expected, atol=1e-4)
    assert state.query_BMC is not None
    assert true.query_BMC is not None
    assert torch.allclose(state.query_BMC, true.query_BMC, atol=1e-4)
    assert torch.allclose(state.window._keys_YBNHD, true.window._keys_YBNHD, atol=1e-4)
    assert torch.allclose(state.window._values_YBNHD, true.window._values_YBNHD, atol=1e-4)


@pytest.mark.usefixtures("triton")
def test_a_stream_in_8_bits_is_near_that_of_the_truths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near, for a number that tips to the next of e4m3 moves what follows by a sixteenth."""
    expected, _ = rollout(1, Precision.FP8_ATTENTION8)
    launched = noted(monkeypatch)
    monkeypatch.setattr(dispatch, "on_device", lambda tensors: True)
    found, _ = rollout(1, Precision.FP8_ATTENTION8)
    assert fallbacks() == {}
    assert {"rows8_kernel", "heads8_kernel", "residual_norm_kernel"} < launched
    assert float((found - expected).norm() / expected.norm()) < 0.02
    exact, _ = rollout(1)
    assert float((found - exact).norm() / exact.norm()) > 0.001
