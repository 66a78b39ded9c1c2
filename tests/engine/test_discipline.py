"""What a forward may not do: read from the device, copy the window, compute things twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from small import small_engine, small_preset
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from echo_ray.benchmark.counting import Meter
from echo_ray.engine.engine import EchoEngine
from echo_ray.engine.generator import Generator
from echo_ray.engine.lanes import HostLanes
from echo_ray.engine.noise import SessionNoise, gaussian
from echo_ray.model.dit import DiT
from echo_ray.model.history import BEGUN
from echo_ray.model.memory import MemoryEncoder
from echo_ray.preset import load_preset
from echo_ray.weights.modules import build_modules
from echo_ray.weights.parts import build_parts

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
    assert {n: inside[n] for n in WINDOW_COPIES if inside[n]} in ({}, {"clone": 2})


@pytest.mark.parametrize("chunk", [0, 2, 8])
def test_a_context_pass_ends_at_the_last_layer_s_keys_and_values(chunk: int) -> None:
    generator, state, noise = generator_at(chunk)
    with torch.no_grad():
        clean = generator.denoise(state, noise)
        generator._context_pass(state, clean, 3 * chunk, see_memory=state.has_history)
        with OpCounter() as denoising:
            generator._flow(state, clean, 1000.0, 3 * chunk, see_memory=state.has_history)
        with OpCounter() as context:
            generator._context_pass(state, clean, 3 * chunk, see_memory=state.has_history)
    products = [ops.counts["addmm"] for ops in (denoising, context)]
    attentions = [
        sum(n for name, n in ops.counts.items() if "dot_product" in name)
        for ops in (denoising, context)
    ]
    # A block: q, k, v, o twice without cross attention's k and v, and two of the feed-forward.
    blocks = len(generator.dit.blocks)
    assert products == [8 * blocks + 1, 8 * (blocks - 1) + 2]
    assert attentions == [2 * blocks, 2 * (blocks - 1)]


def test_a_cut_context_pass_leaves_the_bits_of_a_whole_one() -> None:
    kept = []
    for cut in (True, False):
        generator, state, noise = generator_at(8)
        with torch.no_grad():
            clean = generator.denoise(state, noise)
            if cut:
                generator._context_pass(state, clean, 24, see_memory=True)
            else:
                generator._flow(state, clean, 0.0, 24, see_memory=True)
        window = state.window
        kept.append((window._raw_YBNHD, window._keys_YBNHD, window._values_YBNHD))
    for part, whole in zip(*kept, strict=True):
        assert torch.equal(part, whole)


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
        (DiT, "forward"), (DiT, "remember"), (DiT, "modulations"),
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
    assert calls == {"forward": 6, "remember": 3, "update": 3, "read_out": 3}
    calls.clear()
    engine.step(state, ["a blue square"])
    # The recache is one more context pass, of another length, and rebuilds the memory once.
    assert calls == {
        "forward": 2, "remember": 2, "modulations": 1, "update": 2, "read_out": 2,
        "encode_prompt": 1,
    }  # fmt: skip


SWITCHES = {2: ["a blue square"], 9: ["a red ball"]}


@pytest.fixture
def fetching(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, ...]]]:
    """Shapes of what is copied to the host, by copy."""
    found: list[list[tuple[int, ...]]] = []
    fetch = HostLanes.fetch

    def noted(self: HostLanes, tensors: Any) -> Any:
        found.append([tuple(t.shape) for t in tensors])
        return fetch(self, tensors)

    monkeypatch.setattr(HostLanes, "fetch", noted)
    return found


@pytest.mark.parametrize(
    "cache", [{}, {"point_every": 0}, {"policy": "window"}, {"policy": "absolute"},
              {"global_sink": False}], ids=str,
)  # fmt: skip
def test_a_whole_chunk_reads_its_frames_and_nothing_else(
    cache: dict[str, object],
    fetching: list[list[tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = small_engine((1000, 750, 500, 250), **cache)
    codec = type(engine._modules.codec)
    decode = codec.decode

    def apart(self: Any, latents: torch.Tensor, state: dict[str, torch.Tensor]) -> Any:
        # It asks whether it has begun, which its state says on the host.
        assert all(t.device.type == "cpu" for name, t in state.items() if name == BEGUN)
        with _disable_current_modes():
            return decode(self, latents, state)

    monkeypatch.setattr(codec, "decode", apart)
    for prompts in SWITCHES.values():
        # An encoder looks at what it made; a known prompt does not come to it.
        engine.open(prompts[0], 0)
    state = engine.open("a red ball", 1)
    for n in range(12):
        with Meter() as meter:
            chunk = engine.step(state, SWITCHES.get(n, ()))
        assert not meter.reads, f"chunk {n}"
        assert meter.ops > 100
        frames = (chunk.num_frames, chunk.height, chunk.width, 3)
        assert fetching == [[frames, (4,)]]
        fetching.clear()


@pytest.mark.parametrize(("kind", "name"), [(MemoryEncoder, "update"), (DiT, "remember")])
def test_a_read_anywhere_in_a_chunk_is_seen(
    kind: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(kind, name)

    def looks(self: Any, x: torch.Tensor, *args: Any) -> Any:
        assert float(x.sum().item()) != 0
        return original(self, x, *args)

    monkeypatch.setattr(kind, name, looks)
    engine = small_engine(point_every=0)
    state = engine.open("a red ball", 1)
    for _ in range(5):
        with Meter() as meter:
            engine.step(state)
    assert set(meter.reads) == {"_local_scalar_dense"}


class Uploads(TorchDispatchMode):
    """Sizes of what comes from the host to the meta device, and a refusal of the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in HOST_READS, name
        out = func(*args, **(kwargs or {}))
        if name == "_to_copy" and args[0].device != out.device:
            assert (args[0].device.type, out.device.type) == ("cpu", "meta")
            self.shapes.append(tuple(out.shape))
        return out


def test_the_full_size_model_reads_nothing_and_uploads_noise_alone() -> None:
    """Shapes only: on `meta` a read from the device is an error, and numbers are not computed.

    Two of its layers stand for all, which would take a minute.
    """
    preset = load_preset("echo-infinity-1.3b")
    preset = replace(preset, dit=replace(preset.dit, num_layers=2))
    device, dtype = torch.device("meta"), torch.bfloat16
    cache = replace(preset.cache, point_every=7)
    sampler = replace(preset.sampler, steps=preset.sampler.steps[:2])
    with device:
        parts = {
            name: module.to(dtype) for name, module in build_parts(preset).items() if name != "text"
        }
        rows = torch.zeros(1, preset.dit.text_len, preset.dit.text_dim, dtype=dtype)
    dit, memory = parts["dit"], parts["memory"]
    assert isinstance(dit, DiT)
    assert isinstance(memory, MemoryEncoder)
    generator = Generator(dit, memory, cache, sampler)
    size = (1, cache.frames_per_chunk, preset.dit.in_channels, preset.dit.latent_height,
            preset.dit.latent_width)  # fmt: skip
    noise = SessionNoise(1, size, device, dtype)
    with torch.no_grad():
        state = generator.start(rows)
        for chunk in range(9):
            with Uploads() as uploads:
                if chunk == 8:
                    generator.switch(state, rows)
                generator.generate(state, noise)
            tables = [shape for shape in uploads.shapes if shape != size]
            assert uploads.shapes.count(size) == len(sampler.steps)
            # The eighth chunk is the first to need no rope table that was not there.
            assert chunk != 7 or not tables
