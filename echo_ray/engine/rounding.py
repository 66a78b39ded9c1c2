"""An engine's fingerprint, and what becomes of it when a kernel fails.

A kernel that fails is replaced by its truth, which rounds otherwise. Kernels are tried before a
fingerprint is told (`compile_kernels`); one that fails later changes it, and whatever was made
under the old one is loaded again where that still is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from echo_kernels import failed
from echo_ray.errors import EngineError


def repeat_bits() -> None:
    """Keep cuDNN, for the whole process, to convolutions that repeat their bits, chosen by rule and
    not by a race: it has others, which add up in whatever order numbers come."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


class Rounding:
    """How an engine rounds now; making one calls `repeat_bits`."""

    def __init__(self, told: Callable[[Sequence[str]], str]) -> None:
        """`told`: the fingerprint without some kernels."""
        repeat_bits()
        self._told = told
        self._failed = failed()
        self.fingerprint = told(self._failed)

    def check(self, made_under: str, chunk: int) -> None:
        """Raise `EngineError` for a state of another fingerprint than the present one."""
        if failed() != self._failed:
            self._failed = failed()
            self.fingerprint = self._told(self._failed)
        if made_under != self.fingerprint:
            raise EngineError(
                f"chunk {chunk} would not be rounded as those before: kernels have failed since, "
                f"now {len(self._failed)}: {', '.join(self._failed)}; the fingerprint was "
                f"{made_under} and is {self.fingerprint}: load the state again"
            )


def compile_kernels(run: Callable[[], None]) -> None:
    """Have `run` use every kernel, again for as long as it makes others fail.

    Raises what it raises beside that.
    """
    while True:
        before = failed()
        try:
            run()
        except EngineError:
            if failed() == before:
                raise
        if failed() == before:
            return
