"""Which of an op's two forms runs: its Triton kernel or its plain PyTorch truth."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

VARIABLE = "ECHO_KERNELS"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

P = ParamSpec("P")
R = TypeVar("R")
_log = logging.getLogger("echo_kernels")
_fallbacks: dict[str, int] = {}
_failed: set[str] = set()


class Op(Generic[P, R]):
    """A function with two forms that agree but for rounding.

    `check` raises `ValueError` for arguments that do not fit together, whichever form runs.
    """

    def __init__(
        self,
        name: str,
        check: Callable[P, None],
        truth: Callable[P, R],
        kernel: Callable[P, R],
        *,
        mixed: bool = False,
    ) -> None:
        """`mixed`: its tensors are of several kinds by their nature, which `check` looks at."""
        self.name = name
        self.mixed = mixed
        self.check = check
        self.truth = truth
        self.kernel = kernel

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        # A compiler fuses the truth itself; what it cannot trace stays out of its sight.
        if torch.compiler.is_compiling():
            return self.truth(*args, **kwargs)
        self.check(*args, **kwargs)
        if not _wants_kernel(_tensors((*args, *kwargs.values())), mixed=self.mixed):
            return self.truth(*args, **kwargs)
        if self.name not in _failed:
            try:
                return self.kernel(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception as e:  # compiler, assembler and launcher share no narrower class
                _failed.add(self.name)
                _log.warning("kernel %s failed, its truth runs from here on: %s", self.name, e)
        _fallbacks[self.name] = _fallbacks.get(self.name, 0) + 1
        return self.truth(*args, **kwargs)


def fallbacks() -> dict[str, int]:
    """Calls of this process, by op, that ran the truth because their kernel had failed."""
    return dict(_fallbacks)


def failed() -> tuple[str, ...]:
    """Ops of this process whose kernel has failed: they round as their truth does."""
    return tuple(sorted(_failed))


def check_choice() -> bool:
    """Whether `ECHO_KERNELS` forces the truth. Raises `ValueError` for what it does not know."""
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "reference"):
        raise ValueError(f"{VARIABLE}: {value!r} is unknown; set it to reference or unset it")
    return value == "reference"


def expect(op: str, name: str, found: Tensor, shape: Sequence[int]) -> None:
    """Raise `ValueError` unless a tensor has this shape."""
    if tuple(found.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} is {list(found.shape)}; give {list(shape)}")


def _tensors(arguments: Sequence[object]) -> list[Tensor]:
    parts = (a if isinstance(a, tuple) else (a,) for a in arguments)
    return [t for part in parts for t in part if isinstance(t, Tensor)]


def _wants_kernel(tensors: Sequence[Tensor], *, mixed: bool) -> bool:
    """Kernels have no backward pass, know nothing of autocast and one kind of float."""
    return (
        on_device(tensors)
        and not check_choice()
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not torch.is_autocast_enabled(tensors[0].device.type)
        and (mixed or _one_kind(tensors))
    )


def _one_kind(tensors: Sequence[Tensor]) -> bool:
    kinds = {t.dtype for t in tensors if not t.is_complex()}
    return len(kinds) == 1 and tensors[0].dtype in FLOATS


def on_device(tensors: Sequence[Tensor]) -> bool:
    return all(t.is_cuda for t in tensors)
