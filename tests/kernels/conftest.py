"""Kernels run here whatever `ECHO_KERNELS` says outside; uninitialised memory holds NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_rig import INTERPRETED, load_triton, to_nearest

from echo_kernels import dispatch

HAS_TRITON = load_triton()


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels can be launched, and what they allocate is poisoned."""
    if not HAS_TRITON:
        pytest.skip("Triton is not installed: pip install 'echo-ray[dev]'")
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr("triton.runtime.interpreter._convert_float", to_nearest)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert bool(torch.empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel has failed yet; what fails here is forgotten."""
    monkeypatch.setattr(dispatch, "_failed", set())
    monkeypatch.setattr(dispatch, "_fallbacks", {})


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
