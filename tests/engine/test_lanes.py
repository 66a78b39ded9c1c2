"""The lanes of a GPU without one: what is recorded, waited for and launched where, and in which
order, told by a stand-in for the streams and events of `torch.cuda`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import small_engine

from echo_ray.engine import lanes
from echo_ray.engine.engine import EchoEngine
from echo_ray.engine.lanes import AHEAD, CudaLanes, HostLanes, lanes_of
from echo_ray.engine.step import Stages
from echo_ray.session.snapshot import encode

CUDA = torch.device("cuda", 0)


class Told:
    """The calls in their order, each with the stream that it concerns."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.current = "main"
        self.events = 0
        self.over: set[int] = set()
        """Events that the device has come to."""


class FakeEvent:
    def __init__(self, told: Told, *, enable_timing: bool = False, blocking: bool = False) -> None:
        told.events += 1
        self.number, self.timing, self.blocking, self._told = (
            told.events,
            enable_timing,
            blocking,
            told,
        )

    def record(self, stream: FakeStream) -> None:
        self._told.calls.append(("record", self.number, stream.name))

    def query(self) -> bool:
        return self.number in self._told.over

    def synchronize(self) -> None:
        assert self.blocking
        self._told.calls.append(("wait on the host", self.number))
        self._told.over |= set(range(1, self.number + 1))

    def elapsed_time(self, other: FakeEvent) -> float:
        assert self.timing
        assert other.timing
        return 1000.0 * (other.number - self.number)


class FakeStream:
    def __init__(self, told: Told, name: str) -> None:
        self.name, self._told = name, told

    def wait_event(self, event: FakeEvent) -> None:
        self._told.calls.append(("wait", event.number, self.name))


class FakeTensor:
    """On the device; records in which stream it is used."""

    def __init__(self, told: Told, name: str) -> None:
        self.name, self._told = name, told
        self.device = CUDA

    def record_stream(self, stream: FakeStream) -> None:
        self._told.calls.append(("used", self.name, stream.name))


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def gpu(told: Told, monkeypatch: pytest.MonkeyPatch) -> CudaLanes:
    names = iter(("decode", "copies"))

    @contextmanager
    def stream(lane: FakeStream) -> Iterator[None]:
        before, told.current = told.current, lane.name
        yield
        told.current = before

    def to_pinned(tensor: FakeTensor) -> torch.Tensor:
        told.calls.append(("copy", getattr(tensor, "name", "tensor"), told.current))
        return torch.zeros(1)

    monkeypatch.setattr(lanes, "_to_pinned", to_pinned)
    cuda = SimpleNamespace(
        Stream=lambda device, priority=0: FakeStream(told, next(names)),
        Event=lambda **how: FakeEvent(told, **how),
        current_stream=lambda device: FakeStream(told, told.current),
        stream=stream,
    )
    return CudaLanes(CUDA, cuda)


def test_decoding_waits_for_the_latents_alone_and_runs_in_its_own_lane(
    gpu: CudaLanes, told: Told
) -> None:
    latents, frames = FakeTensor(told, "latents"), FakeTensor(told, "frames")
    clean = gpu.mark()
    told.calls.append(("launch", "context", told.current))
    with gpu.decoding(clean, [latents]):  # type: ignore[list-item]
        told.calls.append(("launch", "decode", told.current))
        copy = gpu.fetch([frames])  # type: ignore[list-item]
    copy.wait()
    assert told.calls == [
        ("record", 1, "main"),
        ("launch", "context", "main"),
        ("wait", 1, "decode"),
        ("used", "latents", "decode"),
        ("launch", "decode", "decode"),
        ("copy", "frames", "decode"),
        ("record", 2, "decode"),
        ("record", 3, "decode"),
        ("wait on the host", 2),
    ]
    assert told.current == "main"


def test_a_snapshot_is_copied_behind_what_was_launched_and_waited_for_by_who_wants_it(
    gpu: CudaLanes, told: Told
) -> None:
    rows = torch.zeros(3)
    copy = gpu.snapshot([FakeTensor(told, "query"), rows])  # type: ignore[list-item]
    begun = list(told.calls)
    assert begun == [
        ("record", 1, "main"),
        ("wait", 1, "copies"),
        ("used", "query", "copies"),
        ("copy", "query", "copies"),
        ("record", 2, "copies"),
    ]
    assert copy.wait()[1] is rows, "what is on the host already is not copied"
    assert told.calls[len(begun) :] == [("wait on the host", 2)]


def test_the_host_runs_so_many_slices_ahead_and_no_more(gpu: CudaLanes, told: Told) -> None:
    for n in range(AHEAD + 2):
        with gpu.launch():
            told.calls.append(("launch", n))
    assert AHEAD == 2
    assert told.calls == [
        ("launch", 0),
        ("record", 1, "main"),
        ("launch", 1),
        ("record", 2, "main"),
        ("wait on the host", 1),
        ("launch", 2),
        ("record", 3, "main"),
        ("wait on the host", 2),
        ("launch", 3),
        ("record", 4, "main"),
    ]


def test_stages_are_measured_on_the_device_and_told_when_they_are_over(
    gpu: CudaLanes, told: Told
) -> None:
    spans: list[Any] = []
    stages = Stages(gpu, spans)
    with stages.timed("denoise"):
        pass
    with stages.timed("context"):
        pass
    told.over = {1, 2, 3}
    assert stages.told() == {"denoise": 1.0}
    assert [name for name, _ in spans] == ["context"]
    told.over.add(4)
    # The next chunk's stages find it where it was left.
    assert Stages(gpu, spans).told() == {"context": 1.0}
    assert spans == []
    assert [call[0] for call in told.calls] == ["record"] * 4, "nobody waited for it"


def engine_on(
    gpu: CudaLanes, monkeypatch: pytest.MonkeyPatch, told: Told, codec: str = "group"
) -> EchoEngine:
    """A real engine on the host whose lanes are those of the stand-in."""
    monkeypatch.setattr(lanes, "_to_pinned", lambda tensor: tensor)
    engine = small_engine(codec=codec, point_every=2)
    engine._lanes = engine._decoders._lanes = gpu
    return engine


def test_a_chunk_waits_once_for_data_and_its_snapshot_not_at_all(
    gpu: CudaLanes, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "AHEAD", 1000)
    engine, plain = engine_on(gpu, monkeypatch, told), small_engine(point_every=2)
    state, alone = engine.open("a red ball", 1), plain.open("a red ball", 1)
    for index in range(6):
        before = len(told.calls)
        assert engine.step(state).digest == plain.step(alone).digest
        calls = told.calls[before:]
        assert [call[0] for call in calls].count("wait on the host") == 1
        fetched = calls.index(next(c for c in calls if c[0] == "wait on the host"))
        recorded = ("record", calls[fetched][1], "decode")
        assert recorded in calls[:fetched], f"chunk {index} waits for its frames"
        # Decoding waits for the mark behind the last denoising step; the context pass, launched
        # behind that mark, is not waited for.
        (waited,) = [c for c in calls if c[0] == "wait"]
        mark = calls.index(("record", waited[1], "main"))
        between = calls[mark + 1 : calls.index(waited)]
        # The end of two slices, and before and behind each pass that is measured.
        assert len(between) >= 4, "the context pass is launched behind the mark"
        assert {(c[0], c[2]) for c in between} == {("record", "main")}
        if state.at_point:
            before = len(told.calls)
            packed = engine.saving(state)
            assert "wait on the host" not in [call[0] for call in told.calls[before:]]
            engine.step(engine.open("a blue box", 2))
            assert encode(packed()) == encode(plain.save(alone))


def test_a_loaded_decoder_is_rebuilt_where_the_live_one_is_made(
    gpu: CudaLanes, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_on(gpu, monkeypatch, told, "tiny")
    state = engine.open("a red ball", 1)
    for _ in range(4):
        engine.step(state)
    snapshot, seen = engine.save(state), []
    codec = engine._modules.codec
    decode = codec.decode
    with monkeypatch.context() as patch:
        spied = lambda *args: (seen.append((args[0].shape[1], told.current)), decode(*args))[1]  # noqa: E731
        patch.setattr(codec, "decode", spied)
        before = len(told.calls)
        again = engine.load(snapshot)
    assert seen == [(1, "decode")] * codec.rebuild_latents
    calls = told.calls[before:]
    # All of them wait for the latents alone, whatever the main lane was given in between.
    assert len({c[1] for c in calls if c[0] == "wait"}) == 1
    # The host waits for the end of each before it runs further ahead: decodings of others come
    # behind two latents and not behind all of them.
    ended = [c[1] for c in calls if c[0] == "record" and c[2] == "decode"]
    waited = [c[1] for c in calls if c[0] == "wait on the host"]
    assert len(ended) == codec.rebuild_latents
    assert set(ended[:-AHEAD]) <= set(waited)
    assert engine.step(again).digest == engine.step(state).digest


def test_a_cpu_has_one_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    found = lanes_of(torch.device("cpu"))
    assert isinstance(found, HostLanes)
    tensor = torch.arange(3)
    assert found.mark() is None
    with found.launch(), found.decoding(None, [tensor]), found.span() as span:
        assert span.seconds() is None
    took_s = span.seconds()
    assert took_s is not None
    assert took_s >= 0
    assert found.fetch([tensor]).wait()[0] is tensor
    assert found.snapshot([tensor]).wait()[0] is tensor
