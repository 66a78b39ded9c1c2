"""Work that the main lane needs later: on a GPU in a stream beside it, on a CPU at once.

The memory's update is of this kind. It reads frames that leave the window, which are there before a
chunk's first forward, and is seen from the second forward on: it runs beside the first. Streams
meet in events alone, and the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


class Later(Protocol):
    def join(self) -> Tensors:
        """What was made; whatever the current stream is given from here on may read it."""
        ...


class Aside(Protocol):
    def start(self, work: Callable[..., Tensors], inputs: Sequence[Tensor]) -> Later:
        """Begin `work(*inputs)`. The inputs may be written over as soon as this returns."""
        ...


@dataclass(frozen=True, slots=True)
class Made:
    """What needs no waiting."""

    tensors: Tensors

    def join(self) -> Tensors:
        return self.tensors


class HostAside:
    """A device of one lane."""

    def start(self, work: Callable[..., Tensors], inputs: Sequence[Tensor]) -> Made:
        return Made(work(*inputs))


@dataclass(frozen=True, slots=True)
class OnStream:
    """What another stream makes, up to the event `over`."""

    tensors: Tensors
    over: Any
    cuda: Any
    device: torch.device

    def join(self) -> Tensors:
        main = self.cuda.current_stream(self.device)
        main.wait_event(self.over)
        for tensor in self.tensors:
            tensor.record_stream(main)
        return self.tensors


class CudaAside:
    """A stream beside the main one.

    A tensor that crosses is recorded where it is used: its memory is not given away before.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        """`cuda`: where streams and events come from."""
        self._device = device
        self._cuda = cuda
        self._stream = cuda.Stream(device)

    def start(self, work: Callable[..., Tensors], inputs: Sequence[Tensor]) -> OnStream:
        copies = [tensor.clone() for tensor in inputs]
        self._stream.wait_event(self._event(self._cuda.current_stream(self._device)))
        for tensor in copies:
            tensor.record_stream(self._stream)
        with self._cuda.stream(self._stream):
            made = work(*copies)
        return OnStream(made, self._event(self._stream), self._cuda, self._device)

    def _event(self, stream: Any) -> Any:
        event = self._cuda.Event()
        event.record(stream)
        return event


def aside_of(device: torch.device) -> Aside:
    """What a device has."""
    return CudaAside(device) if device.type == "cuda" else HostAside()
