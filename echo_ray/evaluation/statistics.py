"""The few statistics that the instruments report, exact and without a library.

Knows nothing of models, frames or files.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True, slots=True)
class Rate:
    """How often something was so, out of how many cases; of none it is not a number."""

    hits: int
    cases: int
    blocks: int | None = None
    """How many groups of cases that are alike there are: the interval is of so many. None: each
    case is for itself."""

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> Rate:
        counted = [bool(o) for o in outcomes]
        return cls(sum(counted), len(counted))

    @classmethod
    def of_blocks(cls, blocks: Iterable[Rate]) -> Rate:
        """Of stretches of a stream, or of clips, which are alike within and not among each other.

        As if all cases of a block were one: the interval is never too narrow.
        """
        full = [b for b in blocks if b.cases]
        return cls(sum(b.hits for b in full), sum(b.cases for b in full), len(full))

    @property
    def value(self) -> float:
        return self.hits / self.cases if self.cases else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval; all of [0, 1] where there is no case."""
        if self.blocks is None or self.blocks == self.cases:
            return wilson(self.hits, self.cases)
        return wilson(self.blocks * self.hits / max(1, self.cases), self.blocks)

    def figures(self) -> dict[str, float | int | None]:
        """For JSON, which has no nan."""
        low, high = self.interval
        value = self.value if self.cases else None
        counts = {"hits": self.hits, "cases": self.cases}
        blocks = {} if self.blocks is None else {"blocks": self.blocks}
        return {"value": value, **counts, **blocks, "low": low, "high": high}


def wilson(hits: float, cases: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    if cases == 0:
        return 0.0, 1.0
    share, square = hits / cases, z * z
    middle = share + square / (2 * cases)
    half = z * math.sqrt(share * (1 - share) / cases + square / (4 * cases * cases))
    below, above = (middle - half) / (1 + square / cases), (middle + half) / (1 + square / cases)
    return (0.0 if hits == 0 else below, 1.0 if hits == cases else above)


@dataclass(frozen=True, slots=True)
class Change:
    """The difference of two shares in points, with its 95 % interval."""

    points: float
    low: float
    high: float

    @classmethod
    def between(cls, first: Rate, last: Rate) -> Change:
        """Last less first, of cases that have nothing to do with each other (Newcombe's method)."""
        value = last.value - first.value
        (low_a, high_a), (low_b, high_b) = first.interval, last.interval
        below = math.hypot(last.value - low_b, high_a - first.value)
        above = math.hypot(high_b - last.value, first.value - low_a)
        return cls(100 * value, 100 * (value - below), 100 * (value + above))

    @classmethod
    def paired(cls, pairs: Sequence[tuple[float, float]]) -> Change:
        """Second less first, of shares of the same cases.

        Wald's interval after one more case that lost everything and one that won it: for yes and no
        that is Bonett and Price's, and it has a width also where no case differs.
        """
        if not pairs:
            return cls(math.nan, -100.0, 100.0)
        gaps = [b - a for a, b in pairs]
        total = len(gaps) + 2
        middle = math.fsum(gaps) / total
        variance = (math.fsum(gap * gap for gap in gaps) + 2) / total - middle * middle
        half = Z95 * math.sqrt(variance / total)
        low, high = max(-1.0, middle - half), min(1.0, middle + half)
        return cls(100 * fmean(gaps), 100 * low, 100 * high)

    def rows(self, name: str) -> dict[str, float]:
        """As rows of a table."""
        return {name: self.points, f"{name}: from": self.low, f"{name}: to": self.high}


@dataclass(frozen=True, slots=True)
class Spread:
    """A sample in three numbers; of an empty one they are not numbers."""

    count: int
    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            return cls(0, math.nan, math.nan)
        return cls(len(values), fmean(values), pstdev(values))

    def figures(self) -> dict[str, float | int | None]:
        mean, deviation = finite(self.mean), finite(self.deviation)
        return {"count": self.count, "mean": mean, "deviation": deviation}


def finite(value: float) -> float | None:
    """The value, or None for what JSON cannot say."""
    return value if math.isfinite(value) else None


def mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the sample does not exceed; infinities count."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two samples compared: Kolmogorov-Smirnov's distance and its asymptotic p-value."""

    distance: float
    p_value: float


def kolmogorov_smirnov(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """The largest gap between two empirical distributions, and how often chance makes it so."""
    if not first or not second:
        return Comparison(math.nan, math.nan)
    a, b = sorted(first), sorted(second)
    distance = max(abs(bisect_right(a, x) / len(a) - bisect_right(b, x) / len(b)) for x in {*a, *b})
    effective = math.sqrt(len(a) * len(b) / (len(a) + len(b)))
    return Comparison(distance, _kolmogorov_tail(distance * (effective + 0.12 + 0.11 / effective)))


def _kolmogorov_tail(scaled: float) -> float:
    """Chance that the scaled distance exceeds this (Kolmogorov's alternating series)."""
    if scaled < 0.2:
        return 1.0
    terms = ((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * math.fsum(terms)))


def psnr_db(error: float) -> float:
    """Of a mean squared error of values in [0, 1]; infinite where there is none."""
    return math.inf if error == 0 else -10.0 * math.log10(error)


def squared_error(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Mean squared difference of pixels as values in [0, 1]."""
    gap = (first.astype(np.float64) - second.astype(np.float64)) / 255.0
    return float((gap * gap).mean())


def majority(votes: Iterable[str]) -> str | None:
    """The most frequent vote, the earliest of equals; None where nobody voted."""
    return heaviest((vote, 1.0) for vote in votes)


def heaviest(votes: Iterable[tuple[str, float]]) -> str | None:
    """The vote with the largest sum of weights, the earliest of equals."""
    sums: dict[str, float] = {}
    for vote, weight in votes:
        sums[vote] = sums.get(vote, 0.0) + weight
    return max(sums, key=lambda vote: sums[vote]) if sums else None
