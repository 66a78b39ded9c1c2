"""What a graph needs of a forward, checked without one; and what happens where there is one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small import small_engine, small_preset, small_tier
from torch import Tensor

from echo_ray.engine.engine import EchoEngine
from echo_ray.engine.generator import Generator
from echo_ray.engine.graph_check import CheckedRecorder
from echo_ray.engine.graphs import CudaRecorder, Graphs, Inputs
from echo_ray.errors import EngineError
from echo_ray.model.computing import Precision

POLICIES: list[dict[str, object]] = [
    {}, {"point_every": 0}, {"policy": "window"}, {"policy": "absolute"}, {"global_sink": False},
]  # fmt: skip
SWITCHES = {2: ["a blue square"], 6: ["a green ball"], 9: ["a red ball"]}


def recorded_engine(**cache: object) -> tuple[EchoEngine, CheckedRecorder]:
    engine, recorder = small_engine((1000, 750, 500), **cache), CheckedRecorder()
    engine._generator._recorder = recorder
    return engine, recorder


def digests(engine: EchoEngine, chunks: int = 12) -> list[str]:
    state = engine.open("a red ball", 3)
    return [engine.step(state, SWITCHES.get(n, ())).digest for n in range(chunks)]


@pytest.mark.parametrize("cache", POLICIES, ids=str)
def test_recorded_forwards_are_replayed_and_change_no_bit(cache: dict[str, object]) -> None:
    engine, recorder = recorded_engine(**cache)
    assert digests(engine) == digests(small_engine((1000, 750, 500), **cache))
    # Five layouts at most come of a growing window, each denoised and kept; a rebuild adds two.
    assert 8 <= recorder.recorded <= 12


@pytest.mark.parametrize("precision", [Precision.FP8, Precision.FP8_ATTENTION8])
def test_every_tier_can_be_recorded(precision: Precision) -> None:
    found = []
    for recorder in (None, CheckedRecorder()):
        engine = small_tier(precision)
        engine._generator._recorder = recorder
        found.append(digests(engine, 8))
    assert found[0] == found[1]


def test_every_layout_is_recorded_once_and_the_next_session_records_none() -> None:
    engine, recorder = recorded_engine()
    state = engine.open("a red ball", 3)
    for _ in range(12):
        engine.step(state)
    graphs = state.latent.window.graphs
    assert graphs is not None
    before = recorder.recorded
    assert before == len(graphs)
    addresses = [t.data_ptr() for t in graphs.inputs.tensors()]
    engine.close(state)
    other = engine.open("a blue square", 4)
    for n in range(12):
        engine.step(other, SWITCHES.get(n, ()))
    assert recorder.recorded == before
    assert [t.data_ptr() for t in graphs.inputs.tensors()] == addresses


def test_interleaved_sessions_have_recordings_of_their_own() -> None:
    engine, _ = recorded_engine()
    expected = [digests(small_engine((1000, 750, 500)), 8)] * 2
    states = [engine.open("a red ball", 3) for _ in range(2)]
    found: list[list[str]] = [[], []]
    for n in range(8):
        steps = [engine.begin(state, SWITCHES.get(n, ())) for state in states]
        while steps:
            for place, step in enumerate(list(steps)):
                chunk = step.advance()
                if chunk is not None:
                    found[place].append(chunk.digest)
                    steps = [] if len(found[0]) == len(found[1]) else steps
    assert found == expected


def test_given_back_recordings_hold_nothing_of_a_session() -> None:
    engine, _ = recorded_engine()
    state = engine.open("a red ball", 3)
    engine.step(state)
    graphs = state.latent.window.graphs
    assert graphs is not None
    assert graphs.inputs._sources
    engine.close(state)
    assert not graphs.inputs._sources


# ---- what the check refuses ---------------------------------------------------------------------


def graphs_of(recorder: CheckedRecorder) -> Graphs:
    return Graphs(recorder)


def twice(function: Callable[[Sequence[Tensor]], Tensor | None]) -> None:
    """Record and replay over inputs that differ in their numbers alone."""
    graphs = graphs_of(CheckedRecorder())
    for _ in range(2):
        graphs.run("key", [torch.rand(4)], function)


def test_numbers_may_differ_between_replays() -> None:
    graphs = graphs_of(CheckedRecorder())
    for n in (1.0, 2.0, 3.0):
        result = graphs.run("key", [torch.full((4,), n)], lambda parts: parts[0] * 2)
        assert result is not None
        assert result.tolist() == [2 * n] * 4


@pytest.mark.parametrize(
    "read",
    [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: bool(x[0] > 2),
     lambda x: torch.equal(x, x), lambda x: x[x > 0.5], lambda x: x.to("meta"),
     lambda x: x.clone().index_put_((x > 0.5,), x[:1])],
)  # fmt: skip
def test_a_read_from_the_device_is_refused(read: Callable[[Tensor], Any]) -> None:
    def work(parts: Sequence[Tensor]) -> Tensor:
        read(parts[0])
        return parts[0] * 2

    with pytest.raises(EngineError, match="waits for the device"):
        twice(work)
    with torch.inference_mode(), pytest.raises(EngineError, match="waits for the device"):
        twice(work)


def test_another_address_is_refused() -> None:
    weights = [torch.rand(4), torch.rand(4)]
    with pytest.raises(EngineError, match="belongs into a buffer"):
        twice(lambda parts: parts[0] * weights.pop())


def test_a_number_of_the_host_that_changes_is_refused() -> None:
    numbers = [1.0, 2.0]
    with pytest.raises(EngineError, match="belongs into a buffer"):
        twice(lambda parts: parts[0] * numbers.pop())


def test_another_layout_under_the_same_key_is_refused() -> None:
    whole = torch.rand(4, 4)
    views = [whole[:2], whole[:3]]
    with pytest.raises(EngineError, match="belongs into a buffer"):
        twice(lambda parts: views.pop() * parts[0])


def test_more_operations_than_were_recorded_are_refused() -> None:
    times = [2, 1]

    def work(parts: Sequence[Tensor]) -> Tensor:
        out = parts[0]
        for _ in range(times.pop()):
            out = out + 1
        return out

    with pytest.raises(EngineError, match="a key of its own"):
        twice(work)


def test_what_outlives_the_call_is_refused() -> None:
    kept: list[Tensor] = []

    def work(parts: Sequence[Tensor]) -> Tensor:
        kept.append(parts[0] + 1)
        return kept[-1] * 2

    with pytest.raises(EngineError, match="outlive the call"):
        twice(work)


def test_a_forward_that_breaks_the_discipline_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = recorded_engine()
    modulated = Generator._modulated

    def anew(self: Generator, *args: Any) -> Any:
        self._modulations.clear()
        return modulated(self, *args)

    # Tables computed anew for each call are no fault: what they hold is copied into buffers.
    monkeypatch.setattr(Generator, "_modulated", anew)
    assert digests(engine, 3) == digests(small_engine((1000, 750, 500)), 3)
    # The same without buffers is one.
    monkeypatch.setattr(Inputs, "load", lambda self, sources: list(sources))
    engine, _ = recorded_engine()
    with pytest.raises(EngineError, match="belongs into a buffer"):
        digests(engine, 3)


# ---- CUDA's part, played by a fake --------------------------------------------------------------


class FakeCuda:
    """Notes what a capture asks of CUDA; `refuses` makes it fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.refuses = False
        self.stream = "main"
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self._capture)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream)
        monkeypatch.setattr(
            torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream)
        )
        monkeypatch.setattr(
            torch._C, "_cuda_clearCublasWorkspaces", lambda: self.said.append("clear"),
            raising=False,
        )  # fmt: skip

    @contextmanager
    def _capture(self, graph: object, pool: str, capture_error_mode: str) -> Iterator[None]:
        assert (graph, pool) == (self, "pool")
        self.said.append(f"capture {capture_error_mode}")
        self.stream = "capture"
        if self.refuses:
            # As PyTorch does where the end of a capture fails: its stream stays the current one.
            raise torch.OutOfMemoryError("no room for a graph")
        yield
        self.stream = "main"
        self.said.append("captured")

    def replay(self) -> None:
        self.said.append("replay")


def test_a_capture_follows_an_eager_run_and_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    graphs = Graphs(CudaRecorder())

    def work(parts: Sequence[Tensor]) -> Tensor:
        fake.said.append("work")
        return parts[0] * 2

    x = torch.ones(2)
    first = graphs.run("key", [x], work)
    # Workspaces of products are neither taken over from anybody nor left to anybody.
    assert fake.said == ["work", "clear", "capture thread_local", "work", "captured", "clear"]
    fake.said.clear()
    second, third = (graphs.run("key", [n * x], work) for n in (2, 3))
    assert fake.said == ["replay", "replay"]
    assert first is not None
    assert first.tolist() == [2.0, 2.0]
    # What was captured is where a replay leaves its result.
    assert second is third is not None


def test_a_failed_capture_runs_eagerly_is_said_once_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeCuda(monkeypatch)
    fake.refuses = True
    recorder = CudaRecorder()
    graphs = Graphs(recorder)
    with caplog.at_level(logging.WARNING):
        for n in (1.0, 2.0, 3.0):
            for key in ("one", "other"):
                found = graphs.run(key, [torch.tensor([n])], lambda parts: parts[0] * 2)
                assert found is not None
                assert found.tolist() == [2 * n]
    assert "replay" not in fake.said
    assert fake.said.count("clear") == 4
    assert fake.stream == "main"
    assert recorder.failures == 2
    engine = small_engine()
    assert "cuda_graph" not in engine.fallbacks()
    engine._recorders = [recorder, CudaRecorder()]
    assert engine.fallbacks()["cuda_graph"] == 2
    assert [r.message for r in caplog.records if "could not be captured" in r.message] == [
        "a CUDA graph could not be captured, its forward runs eagerly: no room for a graph"
    ]


def test_an_error_of_the_forward_itself_is_no_failed_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FakeCuda(monkeypatch)
    recorder = CudaRecorder()

    def work(parts: Sequence[Tensor]) -> Tensor:
        raise RuntimeError("the forward fails")

    with pytest.raises(RuntimeError, match="the forward fails"):
        Graphs(recorder).run("key", [torch.ones(2)], work)
    assert recorder.failures == 0


def test_an_engine_on_a_cpu_records_nothing() -> None:
    engine = small_engine()
    assert engine._generator._recorder is None
    assert engine.open("a red ball", 1).latent.window.graphs is None
    assert small_preset().cache.frames_per_chunk == 3


# ---- inputs -------------------------------------------------------------------------------------


def test_inputs_are_copied_where_they_differ_and_stay_where_they_are() -> None:
    inputs = Inputs()
    one, other = torch.rand(4, 3), torch.rand(3, 4).t()
    (buffer,) = inputs.load([one])
    assert torch.equal(buffer, one)
    buffer.zero_()
    # The same source is not copied again.
    assert inputs.load([one])[0] is buffer
    assert not buffer.any()
    assert inputs.load([other])[0] is buffer
    assert torch.equal(buffer, other)
    assert buffer.is_contiguous()
    # Another shape, and another place, have buffers of their own.
    first, second = inputs.load([torch.rand(2), other])
    assert len({t.data_ptr() for t in (buffer, first, second)}) == 3
    inputs.forget()
    buffer.zero_()
    assert torch.equal(inputs.load([other])[0], other)
