"""The engine at a size that a CPU runs in a moment, checked for what makes it quick on a GPU.

`make bench-cpu-proxy` runs this file: equality with the published loop, no reads of the device, a
budget of operations and bytes for every phase, bit-exact resume. Times say nothing here and are
not looked at. Each check has a test beside it in which it fails.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from echo_ray.benchmark import gate
from echo_ray.benchmark.baseline import Baseline
from echo_ray.benchmark.counting import Meter
from echo_ray.benchmark.random_weights import check_residuals, random_modules
from echo_ray.engine.cache import Window
from echo_ray.engine.engine import EchoEngine
from echo_ray.engine.generator import Generator
from echo_ray.engine.noise import SessionNoise
from echo_ray.errors import EngineError
from echo_ray.model.memory import MemoryEncoder
from echo_ray.preset import Preset, TinyVaeShape, load_preset
from echo_ray.weights.modules import Modules

pytestmark = pytest.mark.timeout(300)
BUDGET = Path(__file__).with_name("budget.json")
SLACK = 0.05
CHUNKS = gate.FIRST_MATURE + 6
CPU = torch.device("cpu")
DTYPES = ("float32", "bfloat16")


@lru_cache(maxsize=8)
def proxy(dtype: str, point_every: int = 0, *, recache: bool | None = None) -> Preset:
    """The published model with every length cut down: 4 layers, 3 heads of 32, 4 x 6 tokens."""
    whole = load_preset("echo-infinity-1.3b")
    assert whole.cache.memory is not None
    dit = replace(
        whole.dit, dim=96, num_heads=3, ffn_dim=256, num_layers=4, latent_height=8,
        latent_width=12, text_dim=64, text_len=16, freq_dim=64,
    )  # fmt: skip
    memory = replace(whole.cache.memory, tokens=None)
    if recache is not None:
        memory = replace(memory, recache=recache)
    codec = TinyVaeShape(encoder_width=4, decoder_widths=(8, 8, 4, 4))
    cache = replace(whole.cache, point_every=point_every, memory=memory)
    return replace(whole, dit=dit, cache=cache, dtype=dtype, codec=codec, small_codec=None)


@lru_cache(maxsize=2)
def modules(dtype: str) -> Modules:
    return random_modules(proxy(dtype), CPU, seed=1)


def baseline(dtype: str) -> Baseline:
    made = modules(dtype)
    assert made.memory is not None
    return Baseline(proxy(dtype), made.dit.state_dict(), made.memory.state_dict())


def generator(dtype: str) -> Generator:
    made, preset = modules(dtype), proxy(dtype)
    return Generator(made.dit, made.memory, preset.cache, preset.sampler)


def noise(dtype: str) -> SessionNoise:
    dit = proxy(dtype).dit
    size = (1, 3, dit.in_channels, dit.latent_height, dit.latent_width)
    return SessionNoise(3, size, CPU, modules(dtype).dit.patch_embedding.weight.dtype)


def prompts(dtype: str) -> list[torch.Tensor]:
    return [modules(dtype).text.encode(p) for p in ("a lighthouse at dusk", "the same in snow")]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


# ---- equality -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_engine_computes_what_the_published_loop_does(dtype: str) -> None:
    """All phases, six mature chunks, a prompt switch among them."""
    results = list(
        gate.compare(generator(dtype), baseline(dtype), prompts(dtype), noise(dtype), CHUNKS)
    )
    assert gate.failed(results) == []
    seen = {(r.what, r.chunk) for r in results}
    assert ("memory", CHUNKS - 1) in seen
    assert {(name, CHUNKS - 1) for name in ("latents", "keys, last layer")} <= seen
    # The first layer's keys hang on no sum of many terms: there the two must agree to the bit.
    if dtype == "float32":
        assert max(r.found for r in results if r.what == "keys, first layer") == 0.0


@pytest.mark.parametrize("recache", [True, False])
@pytest.mark.parametrize("switches", [(0, 1), (1, 1), (2, 3), (4, 5)])
def test_prompts_switched_early_are_those_of_the_published_loop(
    switches: tuple[int, int], recache: bool
) -> None:
    """Before there is a memory, before the window is full, two at once, one chunk after another.

    `recache`: the memory begins anew at a switch, too.
    """
    whole = modules("float32")
    assert whole.memory is not None
    preset = proxy("float32", recache=recache)
    ours = Generator(whole.dit, whole.memory, preset.cache, preset.sampler)
    theirs = Baseline(preset, whole.dit.state_dict(), whole.memory.state_dict())
    three = [*prompts("float32"), whole.text.encode("a red boat")]
    chunks = max(switches) + 3
    results = list(gate.compare(ours, theirs, three, noise("float32"), chunks, switches=switches))
    assert gate.failed(results) == []
    assert {r.chunk for r in results} == set(range(chunks))


def test_the_gate_sees_an_early_switch_that_one_side_does_not_make(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Generator, "switch", lambda *_: None)
    results = gate.compare(
        generator("float32"), baseline("float32"), prompts("float32"), noise("float32"), 2,
        switches=[1],
    )  # fmt: skip
    assert {r.chunk for r in gate.failed(list(results))} == {1}


@pytest.mark.parametrize("wrong", ["blocks.2.self_attn.v.weight", "head.modulation"])
def test_the_gate_sees_one_wrong_weight(wrong: str) -> None:
    other = baseline("float32")
    other.dit = {k: v * 1.01 if k == wrong else v for k, v in other.dit.items()}
    results = gate.compare(generator("float32"), other, prompts("float32"), noise("float32"), 2)
    assert gate.failed(list(results))


def test_the_gate_sees_a_memory_that_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryEncoder, "update", lambda _self, query, *_: query)
    results = list(
        gate.compare(generator("float32"), baseline("float32"), prompts("float32")[:1],
                     noise("float32"), 5)
    )  # fmt: skip
    assert {r.chunk for r in gate.failed(results)} == {4}


def test_the_gate_sees_numbers_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Generator.denoise
    monkeypatch.setattr(Generator, "denoise", lambda *a: whole(*a) * float("nan"))
    results = gate.compare(
        generator("bfloat16"), baseline("bfloat16"), prompts("bfloat16"), noise("bfloat16"), 1
    )
    assert [r.what for r in gate.failed(list(results))] == ["latents"]


def test_random_weights_keep_the_residual_stream_in_bounds() -> None:
    loop = baseline("float32")
    loop.residuals = []
    loop.generate(loop.start(prompts("float32")[0]), noise("float32"))
    low, high = check_residuals(loop.residuals)
    assert 0.1 < low < high < 100
    with pytest.raises(EngineError, match="layer 1 has an RMS of 150"):
        check_residuals([torch.ones(4), 150 * torch.ones(4)])
    with pytest.raises(EngineError, match="RMS of nan"):
        check_residuals([torch.full((4,), float("nan"))])


# ---- reads, operations, bytes -------------------------------------------------------------------


@lru_cache(maxsize=2)
def meters(dtype: str) -> list[Meter]:
    """One for each chunk: every phase, then two mature ones."""
    return measured_anew(dtype)


def measured_anew(dtype: str) -> list[Meter]:
    loop, counted = generator(dtype), []
    state, drawn = loop.start(prompts(dtype)[0]), noise(dtype)
    for _ in range(gate.FIRST_MATURE + 2):
        with Meter() as meter:
            loop.generate(state, drawn)
        counted.append(meter)
    return counted


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_reads_nothing_from_the_device(dtype: str) -> None:
    assert [dict(m.reads) for m in meters(dtype)] == [{}] * (gate.FIRST_MATURE + 2)


def test_the_reads_of_the_published_loop_are_seen() -> None:
    loop = baseline("float32")
    stream, drawn = loop.start(prompts("float32")[0]), noise("float32")
    for _ in range(gate.FIRST_MATURE):
        loop.generate(stream, drawn)
    with Meter() as meter:
        loop.generate(stream, drawn)
    # 7 a layer in the first forward, 4 in each other; the memory's two, and what is to leave.
    assert sum(meter.reads.values()) >= loop.shape.num_layers * (7 + 4 * 4)


Figures = dict[str, dict[str, int]]


def figures(counted: list[Meter]) -> Figures:
    return {f"chunk {n}": {"ops": m.ops, "bytes": m.size_bytes} for n, m in enumerate(counted)}


def over_budget(dtype: str, found: Figures, budget: Figures) -> list[str]:
    """What exceeds a budget by more than the slack, in words."""
    return [
        f"{dtype}, {chunk}: {number} {kind}, the budget is {budget[chunk][kind]}; "
        "make it fewer, or accept it with UPDATE=1 make bench-cpu-proxy"
        for chunk, kinds in found.items()
        for kind, number in kinds.items()
        if number > budget[chunk][kind] * (1 + SLACK)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_operations_and_bytes_of_every_phase_are_within_budget(dtype: str) -> None:
    found = figures(meters(dtype))
    budget: dict[str, Any] = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    if os.environ.get("UPDATE") == "1":
        BUDGET.write_text(json.dumps(budget | {dtype: found}, indent=1, sort_keys=True) + "\n")
        return
    assert over_budget(dtype, found, budget[dtype]) == []


def test_a_copy_of_the_window_exceeds_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = figures(meters("float32"))
    call = Window.call

    def wasteful(self: Window, *args: Any, **kwargs: Any) -> Any:
        for part in self.tensors():
            part.clone()
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Window, "call", wasteful)
    said = over_budget("float32", figures(measured_anew("float32")), budget)
    assert len(said) >= gate.FIRST_MATURE
    assert "UPDATE=1 make bench-cpu-proxy" in said[0]


def test_the_meter_counts_bytes_but_not_views() -> None:
    x = torch.zeros(10, 10)
    with Meter() as meter:
        x.t().unsqueeze(0)
        x.add_(1)
        x.reshape(100) + 1
    assert (meter.ops, meter.size_bytes) == (2, 400 + 800)
    assert not meter.reads


# ---- resume -------------------------------------------------------------------------------------


def digests(engine: EchoEngine, state: Any, count: int) -> list[str]:
    return [engine.step(state).digest for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resumed_session_goes_on_with_the_same_bits(dtype: str) -> None:
    """From its snapshot at a point, as the live one that was consolidated there."""
    engine = EchoEngine(proxy(dtype, point_every=4), modules(dtype), CPU, threads=1)
    live = engine.open("a lighthouse at dusk", 5)
    digests(engine, live, 8)
    snapshot = engine.save(live)
    after = digests(engine, live, 3)
    assert digests(engine, engine.load(snapshot), 3) == after


def test_a_resume_without_its_rebuild_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """And consolidation is what makes it so: without points the live bits are others."""
    engine = EchoEngine(proxy("float32", point_every=5), modules("float32"), CPU, threads=1)
    live = engine.open("a lighthouse at dusk", 5)
    begun = digests(engine, live, 5)
    snapshot = engine.save(live)
    after = digests(engine, live, 1)
    plain = EchoEngine(proxy("float32"), modules("float32"), CPU, threads=1)
    unconsolidated = digests(plain, plain.open("a lighthouse at dusk", 5), 6)
    assert unconsolidated[:5] == begun
    assert unconsolidated[5:] != after
    rebuilding = Generator.rebuilding

    def shorter(self: Generator, state: Any) -> Any:
        state.history_BFCHW = state.history_BFCHW.clone()
        state.history_BFCHW[:, -9] = 0
        return rebuilding(self, state)

    monkeypatch.setattr(Generator, "rebuilding", shorter)
    assert digests(engine, engine.load(snapshot), 1) != after
