"""Times on a device: by its own events where it has them, by the host's clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Spread:
    """What a list of times comes to, in its own unit."""

    median: float
    p95: float
    p99: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Raises `ValueError` for none."""
        if not samples:
            raise ValueError("no sample to take a median of")
        median, p95, p99 = (float(v) for v in np.percentile(samples, (50, 95, 99)))
        return cls(median, p95, p99, len(samples))


@dataclass(frozen=True, slots=True)
class Timer:
    device: torch.device

    def samples(self, work: Callable[[], object], count: int) -> list[float]:
        """Milliseconds of `count` runs. On a GPU the host waits once, after the last of them."""
        if self.device.type != "cuda":
            return [self._host(work) for _ in range(count)]
        pairs = []
        for _ in range(count):
            begin, end = _event(), _event()
            begin.record()
            work()
            end.record()
            pairs.append((begin, end))
        self.settle()
        return [float(b.elapsed_time(e)) for b, e in pairs]

    def once(self, work: Callable[[], object]) -> float:
        """Milliseconds of one run by the host's clock, the device's work included."""
        self.settle()

        def whole() -> None:
            work()
            self.settle()

        return self._host(whole)

    def settle(self) -> None:
        """Wait until the device has nothing to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @staticmethod
    def _host(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - start)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
