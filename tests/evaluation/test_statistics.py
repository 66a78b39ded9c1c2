"""The statistics, by numbers that can be checked by hand or in a book."""

from __future__ import annotations

import math

import numpy as np
import pytest

from echo_ray.evaluation.statistics import (
    Change,
    Rate,
    Spread,
    heaviest,
    kolmogorov_smirnov,
    majority,
    mean,
    psnr_db,
    quantile,
    squared_error,
    wilson,
)


@pytest.mark.parametrize(
    ("hits", "cases", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (29, 29, 0.8830, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilsons_interval(hits: int, cases: int, low: float, high: float) -> None:
    assert wilson(hits, cases) == pytest.approx((low, high), abs=5e-5)


def test_a_rate_of_nothing_is_no_number() -> None:
    nothing = Rate.of([])
    assert math.isnan(nothing.value)
    assert nothing.figures() == {"value": None, "hits": 0, "cases": 0, "low": 0.0, "high": 1.0}
    assert Rate.of([True, False, True, True]) == Rate(3, 4)
    assert Rate(3, 4).value == 0.75


def test_cases_of_one_block_count_once_in_the_interval() -> None:
    stretches = [Rate(50, 50), Rate(40, 50), Rate(0, 0), Rate(30, 50)]
    pooled = Rate.of_blocks(stretches)
    assert (pooled.hits, pooled.cases, pooled.blocks) == (120, 150, 3)
    assert pooled.interval == pytest.approx(wilson(2.4, 3))
    assert pooled.figures()["blocks"] == 3
    low, high = Rate.of_blocks([Rate(50, 50)] * 20).interval
    assert (low, high) == pytest.approx((0.8389, 1.0), abs=5e-5)
    assert Rate.of_blocks([Rate(0, 0)]).interval == (0.0, 1.0)
    assert Rate.of_blocks([Rate(1, 1), Rate(0, 1)]).interval == Rate(1, 2).interval


def test_changes_of_two_samples() -> None:
    # Newcombe 1998, example (a): 56/70 less 48/80.
    change = Change.between(Rate(48, 80), Rate(56, 70))
    assert change.points == pytest.approx(20.0)
    assert (change.low, change.high) == pytest.approx((5.24, 33.39), abs=0.01)
    equal = Change.between(Rate(20, 20), Rate(20, 20))
    assert equal.points == 0
    assert equal.low == -equal.high == pytest.approx(-16.11, abs=0.01)


def test_changes_of_the_same_cases() -> None:
    pairs = [(True, True)] * 40 + [(True, False)] * 8 + [(False, True)] * 2 + [(False, False)] * 50
    change = Change.paired(pairs)
    assert change.points == pytest.approx(-6.0)
    half = 196 * math.sqrt((12 / 102 - (6 / 102) ** 2) / 102)
    assert change.low == pytest.approx(-600 / 102 - half, abs=1e-3)
    assert change.high == pytest.approx(-600 / 102 + half, abs=1e-3)
    assert change.rows("x") == {"x": change.points, "x: from": change.low, "x: to": change.high}
    swapped = Change.paired([(b, a) for a, b in pairs])
    assert (swapped.points, swapped.low) == pytest.approx((6.0, -change.high))
    none = Change.paired([])
    assert math.isnan(none.points)
    assert (none.low, none.high) == (-100.0, 100.0)
    assert Change.paired([(True, False)]).low == -100
    # Shares that differ by little say more than verdicts that differ in few cases.
    steady = Change.paired([(0.5, 0.6), (0.6, 0.5)] * 50)
    flips = Change.paired([(1, 0), (0, 1)] * 5 + [(1, 1)] * 90)
    assert steady.points == pytest.approx(0)
    assert 0 < steady.high < 0.6 * flips.high


def test_spread() -> None:
    assert Spread.of([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]) == Spread(8, 5.0, 2.0)
    assert Spread.of([]).figures() == {"count": 0, "mean": None, "deviation": None}
    assert math.isnan(mean([]))


@pytest.mark.parametrize(
    ("share", "value"), [(0.5, 2), (0.9, math.inf), (0.75, 3), (0.2, 1), (1.0, math.inf)]
)
def test_quantiles_count_what_never_happens(share: float, value: float) -> None:
    assert quantile([3, 1, math.inf, 2], share) == value
    assert math.isnan(quantile([], share))


def test_kolmogorov_smirnov() -> None:
    apart = kolmogorov_smirnov([1, 2, 3, 4], [5, 6, 7, 8])
    assert apart.distance == 1.0
    equal = kolmogorov_smirnov([1, 2, 3], [3, 2, 1])
    assert (equal.distance, equal.p_value) == (0.0, 1.0)
    assert kolmogorov_smirnov([1, 2, 3, 4], [3, 4, 5, 6]).distance == 0.5
    # Two samples of 100 at the distance of the 5 % level: 1.358 * sqrt(2 / 100).
    first = np.arange(100) / 100
    shifted = first + 0.19
    p = kolmogorov_smirnov(first.tolist(), shifted.tolist()).p_value
    assert 0.03 < p < 0.06
    assert math.isnan(kolmogorov_smirnov([], [1.0]).distance)


def test_psnr_and_error() -> None:
    black, gray = np.zeros((2, 2), np.uint8), np.full((2, 2), 51, np.uint8)
    assert squared_error(gray, black) == squared_error(black, gray) == pytest.approx(0.04)
    assert psnr_db(0.01) == pytest.approx(20.0)
    assert psnr_db(0.0) == math.inf


def test_votes() -> None:
    assert majority(["b", "a", "a", "b", "c"]) == "b"
    assert majority([]) is None
    assert heaviest([("a", 1.0), ("b", 1.5), ("a", 1.0)]) == "a"
