"""The memory's update beside the first forward: what waits for what, with a fake for CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small import small_engine
from torch import Tensor

from echo_ray.engine.aside import CudaAside, HostAside, aside_of
from echo_ray.engine.cache import Window
from echo_ray.engine.forward import Forward

CPU = torch.device("cpu")


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.name = f"event {cuda.events}"
        cuda.events += 1

    def record(self, stream: FakeStream) -> None:
        self._cuda.said.append(f"{stream.name}: record {self.name}")


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self._cuda, self.name = cuda, name

    def wait_event(self, event: FakeEvent) -> None:
        self._cuda.said.append(f"{self.name}: wait {event.name}")


class FakeCuda:
    """Streams and events by name, and what is asked of them; `note` says what ran where."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.events = 0
        self._current = FakeStream(self, "main")

    def Stream(self, device: torch.device) -> FakeStream:
        return FakeStream(self, "side")

    def Event(self) -> FakeEvent:
        return FakeEvent(self)

    def current_stream(self, device: torch.device) -> FakeStream:
        return self._current

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self._current = self._current, stream
        yield
        self._current = before

    def note(self, what: str) -> None:
        self.said.append(f"{self._current.name}: {what}")


@pytest.fixture
def crossed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, str]]:
    """Tensors and the stream that they were recorded on."""
    found: list[tuple[Tensor, str]] = []

    def record_stream(self: Tensor, stream: Any) -> None:
        found.append((self, stream.name))

    monkeypatch.setattr(Tensor, "record_stream", record_stream)
    return found


def test_a_side_stream_waits_for_its_inputs_and_is_waited_for(
    crossed: list[tuple[Tensor, str]],
) -> None:
    cuda = FakeCuda()
    aside = CudaAside(CPU, cuda)
    slots = torch.ones(3)
    seen: list[Tensor] = []

    def work(x: Tensor) -> tuple[Tensor, ...]:
        cuda.note("work")
        seen.append(x)
        return x + 1, x + 2

    later = aside.start(work, [slots])
    # The slots move at once; the work has a copy of its own.
    slots.zero_()
    cuda.note("first forward")
    assert seen[0].tolist() == [1.0] * 3
    one, two = later.join()
    cuda.note("second forward")
    assert cuda.said == [
        "main: record event 0", "side: wait event 0", "side: work", "side: record event 1",
        "main: first forward", "main: wait event 1", "main: second forward",
    ]  # fmt: skip
    assert [(t is seen[0], t is one, t is two, lane) for t, lane in crossed] == [
        (True, False, False, "side"), (False, True, False, "main"), (False, False, True, "main"),
    ]  # fmt: skip


def test_a_cpu_has_no_side_stream() -> None:
    aside = aside_of(CPU)
    assert isinstance(aside, HostAside)
    x = torch.ones(2)
    assert aside.start(lambda t: (t,), [x]).join()[0] is x


def run(cuda: FakeCuda | None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    engine = small_engine((1000, 500), point_every=0)
    if cuda is not None:
        engine._generator._aside = CudaAside(CPU, cuda)
        memory = engine._generator.memory
        for kind, name in ((Forward, "flow"), (Window, "set_memory"), (type(memory), "update")):
            original = getattr(kind, name)

            def noted(*args: Any, _original: Any = original, _name: str = name) -> Any:
                cuda.note(_name)
                return _original(*args)

            monkeypatch.setattr(kind, name, noted)
    state = engine.open("a red ball", 3)
    return [engine.step(state, ["a blue square"] if n == 6 else ()).digest for n in range(9)]


@pytest.mark.usefixtures("crossed")
def test_the_update_runs_beside_the_first_forward_and_before_the_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = run(None, monkeypatch)
    cuda = FakeCuda()
    assert run(cuda, monkeypatch) == expected
    said = [line for line in cuda.said if "event" not in line]
    # The last chunk evicts: its update is launched first, and shown between its two forwards.
    assert said[-4:] == ["side: update", "main: flow", "main: set_memory", "main: flow"]
    joined = [n for n, line in enumerate(cuda.said) if line.startswith("main: wait")]
    shown = [n for n, line in enumerate(cuda.said) if line == "main: set_memory"]
    flows = [n for n, line in enumerate(cuda.said) if line == "main: flow"]
    assert flows[-2] < joined[-1] < shown[-1] < flows[-1]
