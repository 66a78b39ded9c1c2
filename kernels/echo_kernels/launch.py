"""Triton, imported and asked to compile no sooner than the first launch.

A kernel is a plain function at the top of its module under `@kernel`; `tl` in its body is
`triton.language`, which modules import for type checkers only. Kernels may call each other. Triton
reads annotations, too: every parameter is a `tl.tensor` or a `tl.constexpr`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from types import FunctionType
from typing import Any

from torch import Tensor

OPTIONS = {"enable_fp_fusion": False}
"""How kernels are compiled: products and sums stay apart, as the truth rounds both."""


class Kernel:
    """A Triton function that is compiled when it is first launched or called by another."""

    def __init__(self, function: FunctionType) -> None:
        self.function = function

    @cached_property
    def compiled(self) -> Any:
        """Triton's function; the interpreter's if `TRITON_INTERPRET` is 1. May raise anything."""
        import triton
        import triton.language as tl

        plain = self.function
        names = {
            name: value.compiled if isinstance(value, Kernel) and value is not self else value
            for name, value in plain.__globals__.items()
            if name in plain.__code__.co_names or name.startswith("__")
        }
        # A copy, so that the module's own names stay what type checkers see.
        bound = FunctionType(plain.__code__, names | {"tl": tl}, plain.__name__)
        bound.__annotations__ = plain.__annotations__
        bound.__module__, bound.__qualname__ = plain.__module__, plain.__qualname__
        return triton.jit(bound)

    def launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Run one program per place of the grid; an empty grid runs nothing."""
        if all(grid):
            self.compiled[grid](*arguments, **constants, **OPTIONS)

    def __call__(self, *arguments: Any) -> Any:
        raise TypeError(f"{self.function.__name__} runs on a device only; use launch")


def kernel(function: Callable[..., Any]) -> Kernel:
    """Mark a function written in Triton's language."""
    assert isinstance(function, FunctionType)
    return Kernel(function)


def block_of(count: int) -> int:
    """The power of two that covers `count` elements, which is what Triton's ranges take."""
    return 1 << max(0, count - 1).bit_length()


def rows_of(x: Tensor) -> Tensor:
    """The tensor itself if elements of its last axis are neighbours, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
