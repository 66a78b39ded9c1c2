"""Forwards that are recorded once and replayed: no launch, no decision, no allocation of their own.

A recording is bound to its addresses, so all that differs between two replays is copied into
buffers that stay: latents, modulations, rope tables, the prompt. What is recorded over an arena
belongs to it, one recording for each kind of forward and layout of the window. On CUDA a recording
is a graph (`CudaRecorder`); `graph_check.CheckedRecorder` runs the same path on any device and
refuses what a graph could not replay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], Tensor | None]
"""What is recorded; it may run twice before its result counts, so it must not add to anything."""

_log = logging.getLogger(__name__)


class Recording(Protocol):
    def replay(self, work: Work) -> Tensor | None:
        """The result of what was recorded, valid until the next replay. `work` is what to run
        where nothing could be recorded."""
        ...


class Recorder(Protocol):
    """How a device records; one for all arenas of an engine."""

    failures: int
    """Recordings that failed; their forwards run eagerly."""

    def record(self, work: Work) -> tuple[Tensor | None, Recording]:
        """Run `work`, and keep how to do so again."""
        ...


class Eager:
    """A recording that could not be made."""

    def replay(self, work: Work) -> Tensor | None:
        return work()


class CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, result: Tensor | None) -> None:
        self._graph = graph
        self._result = result

    def replay(self, work: Work) -> Tensor | None:
        self._graph.replay()
        return self._result


class CudaRecorder:
    """Captures CUDA graphs. All share one memory pool: they run one after the other, on one stream,
    and each result is kept and used up before the next replay.

    Workspaces of cuBLAS lie in that pool, too. Left to itself PyTorch has one for all graphs of the
    process: those of another recorder would write to it at the same time, and the end of any graph
    would free it under all others (PyTorch issue 193402).
    """

    def __init__(self) -> None:
        self.failures = 0
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work) -> tuple[Tensor | None, Recording]:
        """`work` runs eagerly first, which compiles kernels and makes library handles."""
        result = work()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may copy snapshots meanwhile: only this one's calls are part of it.
            with (
                _stream_kept(),
                _workspaces_apart(),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                kept = work()
        except RuntimeError as e:  # out of memory is one
            if not self.failures:
                _log.warning("a CUDA graph could not be captured, its forward runs eagerly: %s", e)
            self.failures += 1
            return result, Eager()
        return result, CudaGraph(graph, kept)


@contextmanager
def _stream_kept() -> Iterator[None]:
    """The current stream is the same after it: a capture that fails at its end stays on its own."""
    before = torch.cuda.current_stream()
    try:
        yield
    finally:
        torch.cuda.set_stream(before)


@contextmanager
def _workspaces_apart() -> Iterator[None]:
    """A capture makes workspaces of its own, which nobody finds after it."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


class Inputs:
    """Buffers that recordings read, one for each place and shape, filled where a source differs.

    A source is never written in place: the same tensor holds the same values.
    """

    def __init__(self) -> None:
        self._buffers: dict[Hashable, Tensor] = {}
        self._sources: dict[Hashable, Tensor] = {}

    def load(self, sources: Sequence[Tensor]) -> list[Tensor]:
        """The buffers, in order, now holding what the sources hold."""
        loaded = []
        for place, source in enumerate(sources):
            key = (place, source.shape, source.dtype)
            if key not in self._buffers:
                self._buffers[key] = torch.empty_like(source, memory_format=torch.contiguous_format)
            if self._sources.get(key) is not source:
                self._buffers[key].copy_(source)
                self._sources[key] = source
            loaded.append(self._buffers[key])
        return loaded

    def forget(self) -> None:
        """Hold no source any longer; the buffers stay where they are."""
        self._sources.clear()

    def tensors(self) -> list[Tensor]:
        return list(self._buffers.values())


class Graphs:
    """The recordings over one arena."""

    def __init__(self, recorder: Recorder) -> None:
        self.inputs = Inputs()
        self._recorder = recorder
        self._recordings: dict[Hashable, Recording] = {}

    def run(
        self,
        key: Hashable,
        sources: Sequence[Tensor],
        function: Callable[[Sequence[Tensor]], Tensor | None],
    ) -> Tensor | None:
        """What `function` makes of the sources: recorded at a key's first use, replayed after.

        `key` has to tell apart all that the recording fixes. The result is overwritten by the
        next replay.
        """
        buffers = self.inputs.load(sources)

        def work() -> Tensor | None:
            return function(buffers)

        recording = self._recordings.get(key)
        if recording is not None:
            return recording.replay(work)
        result, self._recordings[key] = self._recorder.record(work)
        return result

    def __len__(self) -> int:
        return len(self._recordings)
