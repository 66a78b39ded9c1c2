"""What a forward may not do: read from the device, copy the window, compute things twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small import small_engine, small_preset
from torch.utils._python_dispatch import TorchDispatchMode

from echo_ray.engine.engine import EchoEngine
from echo_ray.engine.generator import Generator
from echo_ray.engine.noise import gaussian
from echo_ray.model.dit import DiT
from echo_ray.model.memory import MemoryEncoder
from echo_ray.weights.modules import build_modules

HOST_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
WINDOW_COPIES = ("cat", "stack", "clone", "roll", "index_select", "gather", "repeat")


class OpCounter(TorchDispatchMode):
    """Counts every operation by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def found(self, names: tuple[str, ...]) -> dict[str, int]:
        return {n: self.counts[n] for n in names if self.counts[n]}


def generator_at(chunk: int) -> tuple[Generator, Any, Any]:
    preset = small_preset(point_every=0)
    torch.manual_seed(1)
    modules = build_modules(preset)
    generator = Generator(modules.dit.eval(), modules.memory, preset.cache, preset.sampler)
    noises = [[gaussian(1, c, s, (1, 3, 4, 4, 4)) for s in range(2)] for c in range(chunk + 3)]

    def noise(c: int, s: int) -> torch.Tensor:
        return noises[c][s]

    with torch.no_grad():
        state = generator.start(modules.text.encode("a red ball"))
        for _ in range(chunk):
            generator.generate(state, noise)
    return generator, state, noise


@pytest.mark.parametrize("chunk", [1, 3, 4, 8])
def test_a_chunk_reads_nothing_from_the_device(chunk: int) -> None:
    generator, state, noise = generator_at(chunk)
    with torch.no_grad(), OpCounter() as ops:
        generator.generate(state, noise)
    assert ops.counts["addmm"] > 20
    assert ops.found(HOST_READS) == {}


def test_a_forward_copies_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, state, noise = generator_at(8)
    inside: Counter[str] = Counter()
    forward = DiT.forward

    def watched(self: DiT, *args: Any, **kwargs: Any) -> torch.Tensor:
        with OpCounter() as ops:
            out = forward(self, *args, **kwargs)
        inside.update(ops.counts)
        return out

    monkeypatch.setattr(DiT, "forward", watched)
    with torch.no_grad():
        generator.generate(state, noise)
    assert inside["addmm"] > 20
    # The patch of the output is the one thing that is laid out anew.
    assert {n: inside[n] for n in WINDOW_COPIES if inside[n]} in ({}, {"clone": 3})


def test_keys_and_values_are_views_of_the_same_slots_for_ever() -> None:
    generator, state, noise = generator_at(7)
    before = (state.window._keys_YBNHD.data_ptr(), state.window._values_YBNHD.data_ptr())
    with torch.no_grad():
        generator.generate(state, noise)
        call = state.window.call(21, 3, see_memory=True)
        slots = call.slots(1)
    assert (state.window._keys_YBNHD.data_ptr(), state.window._values_YBNHD.data_ptr()) == before
    for view in (slots.keys_BKHD, slots.seen_keys_BMHD):
        assert view._base is state.window._keys_YBNHD
    for view in (slots.values_BKHD, slots.seen_values_BMHD):
        assert view._base is state.window._values_YBNHD


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    calls: Counter[str] = Counter()
    for kind, name in (
        (MemoryEncoder, "update"), (MemoryEncoder, "read_out"), (DiT, "encode_prompt"),
        (DiT, "forward"),
    ):  # fmt: skip
        original = getattr(kind, name)

        def wrapped(
            self: Any, *args: Any, _original: Any = original, _name: str = name, **kwargs: Any
        ) -> Any:
            calls[_name] += 1
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, wrapped)
    yield calls


def test_memory_once_an_update_and_prompts_once_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: EchoEngine = small_engine(point_every=0)
    state = engine.open("a red ball", 1)
    for _ in range(8):
        engine.step(state)
    with counted(monkeypatch) as calls:
        for _ in range(3):
            engine.step(state)
    # Two denoising steps and the context pass; one eviction each.
    assert calls == {"forward": 9, "update": 3, "read_out": 3}
    calls.clear()
    engine.step(state, ["a blue square"])
    # The recache is one more forward, and rebuilds the memory once.
    assert calls == {"forward": 4, "update": 2, "read_out": 2, "encode_prompt": 1}
