"""Work cut into slices, so that work of other sessions can come between two of them.

A generator of slices does one with every `next` and gives its result with the last.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
Slices = Generator[None, None, T]
"""Yields between two slices, so there is one slice more than there are yields."""


def whole(slices: Slices[T]) -> T:
    """All slices, one after the other; what they make."""
    while True:
        try:
            next(slices)
        except StopIteration as end:
            made: T = end.value
            return made
