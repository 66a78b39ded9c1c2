"""A kernel that fails: before the fingerprint is told it is part of it, later it changes it."""

from __future__ import annotations

import pytest
import torch
from small import small_engine, small_preset

from echo_kernels import dispatch, failed
from echo_kernels.launch import Kernel
from echo_ray.engine.build import warm_up
from echo_ray.engine.fingerprint import numerics_of
from echo_ray.engine.rounding import compile_kernels
from echo_ray.errors import EngineError
from echo_ray.model.computing import Computing
from echo_ray.session.fingerprint import Fit, fit


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """No kernel has failed yet; what fails here is forgotten."""
    names: set[str] = set()
    monkeypatch.setattr(dispatch, "_failed", names)
    monkeypatch.setattr(dispatch, "_fallbacks", {})
    return names


def test_a_kernel_that_fails_later_changes_the_fingerprint(fresh: set[str]) -> None:
    engine = small_engine(point_every=2)
    before, state, other = engine.fingerprint, *(engine.open("a red ball", s) for s in (1, 2))
    for _ in range(2):
        engine.step(state)
    snapshot = engine.save(state)
    fresh.add("rms_norm")
    told = r"chunk 2 would not be rounded .* now 1: rms_norm; .* load the state again"
    with pytest.raises(EngineError, match=told):
        engine.step(state)
    with pytest.raises(EngineError, match="chunk 0 would not"):
        engine.step(other)
    assert fit(before, engine.fingerprint) is Fit.OTHER_NUMERICS
    assert engine.step(engine.load(snapshot)).index == 2
    assert engine.step(engine.open("a red ball", 2)).index == 0


def test_an_engine_keeps_cudnn_to_what_repeats_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, other in (("deterministic", False), ("benchmark", True)):
        monkeypatch.setattr(torch.backends.cudnn, name, other)
    small_engine()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


def test_a_chunk_within_which_a_kernel_fails_is_never_seen(fresh: set[str]) -> None:
    engine = small_engine()
    state = engine.open("a red ball", 1)
    slices = engine.begin(state)
    assert slices.advance() is None
    fresh.add("rms_norm")
    with pytest.raises(EngineError, match="rms_norm"):
        next(chunk for chunk in iter(slices.advance, "") if chunk is not None)


def test_all_kernels_are_tried_before_the_fingerprint_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: Kernel, *args: object, **constants: object) -> None:
        raise RuntimeError("no C compiler")

    expected = small_engine().fingerprint
    monkeypatch.setattr(dispatch, "on_device", lambda tensors: True)
    monkeypatch.setattr(Kernel, "launch", broken)
    preset = small_preset()
    engine = small_engine()
    compile_kernels(lambda: warm_up(engine, preset.cache))
    assert set(failed()) == {
        "chunk_advance", "frames_to_uint8", "layernorm_modulate", "memory_gate_blend",
        "place_memory", "qk_norm_rope_write", "residual_layernorm", "residual_modulate", "rms_norm",
    }  # fmt: skip
    told = engine.fingerprint
    assert told != expected
    state = engine.open("a red ball", 1)
    for _ in range(7):
        engine.step(state)
    assert engine.fingerprint == told == small_engine().fingerprint
    assert set(engine.fallbacks()) == set(failed())


def test_a_warm_up_that_fails_for_itself_says_so() -> None:
    def run() -> None:
        raise EngineError("chunk 3 failed")

    with pytest.raises(EngineError, match="chunk 3 failed"):
        compile_kernels(run)


def test_each_set_of_failed_kernels_rounds_its_own_way() -> None:
    cpu = torch.device("cpu")
    sets = [(), ("rms_norm",), ("linear8",), ("linear8", "rms_norm")]
    assert len({numerics_of(cpu, cpu, 1, Computing(), names) for names in sets}) == len(sets)
