"""Where the parts of a chunk run on a device, and how the host hears that they are over.

A GPU has three lanes, each a stream. Forwards take the main one, PyTorch's current stream. Decoding
has its own, so that the frames of a chunk are made, and sent to the host, beside its context pass;
snapshots are copied in the third. Lanes meet in events alone: nothing here reads from the device,
and the host waits for one copy a chunk. It also waits before it runs more than `AHEAD` slices in
front of the device, which leaves the device always one to do, and lets a session that comes now
begin behind those and not behind a whole chunk.

A CPU has one lane, the host itself.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

AHEAD = 2
"""Slices that the device may have before it: one at work, one to go on with."""


class Event(Protocol):
    """A place in a stream, as far as it is used here."""

    def record(self, stream: Any) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Any) -> float: ...


Mark = Event | None
"""A place in the main lane; None where there is only one lane."""


class Span(Protocol):
    """Work of one stage, from its begin to its end."""

    def seconds(self) -> float | None:
        """How long it took on its device; None while it is not over."""
        ...


class Copy(Protocol):
    """Tensors on their way to the host."""

    def wait(self) -> list[Tensor]:
        """The tensors on the host, once all of them are there. Any thread may wait."""
        ...


class Lanes(Protocol):
    """The lanes of one device, for the one thread that launches work on it."""

    def launch(self) -> AbstractContextManager[None]:
        """Around everything that one slice launches; waits while the device has enough to do."""
        ...

    def span(self) -> AbstractContextManager[Span]:
        """Measures what is launched inside, in the lane that is current there."""
        ...

    def mark(self) -> Mark:
        """Everything that the main lane was given so far."""
        ...

    def decoding(self, after: Mark, inputs: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Launch into the decoding lane, behind `after`; `inputs` were made in the main lane."""
        ...

    def fetch(self, tensors: Sequence[Tensor]) -> Copy:
        """Start to copy tensors to the host, behind what the current lane was given so far."""
        ...

    def snapshot(self, tensors: Sequence[Tensor]) -> Copy:
        """As `fetch`, but beside the main lane; nobody may write to these tensors any more."""
        ...


@dataclass(slots=True)
class HostSpan:
    """Seconds of the host's own clock."""

    began_s: float
    ended_s: float | None = None

    def seconds(self) -> float | None:
        return None if self.ended_s is None else self.ended_s - self.began_s


@dataclass(frozen=True, slots=True)
class HostCopy:
    """Tensors that need no copying, or are copied when they are waited for."""

    tensors: tuple[Tensor, ...]

    def wait(self) -> list[Tensor]:
        return [tensor.to("cpu") for tensor in self.tensors]


class HostLanes:
    """One lane: whatever is launched is over when the call returns."""

    def launch(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def span(self) -> Iterator[HostSpan]:
        span = HostSpan(time.perf_counter())
        yield span
        span.ended_s = time.perf_counter()

    def mark(self) -> Mark:
        return None

    def decoding(self, after: Mark, inputs: Sequence[Tensor]) -> AbstractContextManager[None]:
        return nullcontext()

    def fetch(self, tensors: Sequence[Tensor]) -> HostCopy:
        return HostCopy(tuple(tensors))

    def snapshot(self, tensors: Sequence[Tensor]) -> HostCopy:
        return HostCopy(tuple(tensors))


@dataclass(frozen=True, slots=True)
class CudaSpan:
    """Seconds between two events of a stream."""

    began: Event
    ended: Event

    def seconds(self) -> float | None:
        return self.began.elapsed_time(self.ended) / 1000.0 if self.ended.query() else None


@dataclass(frozen=True, slots=True)
class CudaCopy:
    """Pinned host memory, and the event behind which it is filled."""

    tensors: tuple[Tensor, ...]
    filled: Event

    def wait(self) -> list[Tensor]:
        self.filled.synchronize()
        return list(self.tensors)


class CudaLanes:
    """Three streams of one GPU. A tensor that crosses to another lane is recorded there.

    Without that its memory would be given away, as soon as nobody on the host names it, to work
    that the other lane does not wait for.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        """`cuda`: where streams and events come from."""
        self._device = device
        self._cuda = cuda
        # Somebody waits for frames, and nobody for the end of the context pass beside them.
        self._decode = self._cuda.Stream(device, priority=-1)
        self._copies = self._cuda.Stream(device)
        self._launched: deque[list[Event]] = deque()
        self._slice: list[Event] = []
        """Ends of what this slice has launched beside the main lane."""

    @contextmanager
    def launch(self) -> Iterator[None]:
        while len(self._launched) >= AHEAD:
            for event in self._launched.popleft():
                event.synchronize()
        self._slice = []
        yield
        self._launched.append([*self._slice, self._recorded()])

    @contextmanager
    def span(self) -> Iterator[CudaSpan]:
        span = CudaSpan(self._recorded(timing=True), self._cuda.Event(enable_timing=True))
        yield span
        span.ended.record(self._cuda.current_stream(self._device))

    def mark(self) -> Mark:
        return self._recorded()

    @contextmanager
    def decoding(self, after: Mark, inputs: Sequence[Tensor]) -> Iterator[None]:
        with self._crossed(self._decode, after, inputs):
            yield
            self._slice.append(self._recorded())

    def fetch(self, tensors: Sequence[Tensor]) -> CudaCopy:
        copies = tuple(t if t.device.type == "cpu" else _to_pinned(t) for t in tensors)
        return CudaCopy(copies, self._recorded())

    def snapshot(self, tensors: Sequence[Tensor]) -> CudaCopy:
        with self._crossed(self._copies, self.mark(), tensors):
            return self.fetch(tensors)

    @contextmanager
    def _crossed(self, lane: Any, after: Mark, inputs: Sequence[Tensor]) -> Iterator[None]:
        if after is not None:
            lane.wait_event(after)
        for tensor in inputs:
            if tensor.device.type == "cuda":
                tensor.record_stream(lane)
        with self._cuda.stream(lane):
            yield

    def _recorded(self, *, timing: bool = False) -> Event:
        # Blocking: a host thread that waits sleeps, and does not take a core from the others.
        event: Event = self._cuda.Event(enable_timing=timing, blocking=True)
        event.record(self._cuda.current_stream(self._device))
        return event


def _to_pinned(tensor: Tensor) -> Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def lanes_of(device: torch.device) -> Lanes:
    """The lanes that a device has."""
    return CudaLanes(device) if device.type == "cuda" else HostLanes()
