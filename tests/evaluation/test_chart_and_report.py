"""Pictures that can be read back, tables, and JSON without numbers that are none."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from echo_ray.errors import InvalidRequestError
from echo_ray.evaluation.chart import PALETTE, Bar, Bars, Line, Lines, axis, broken, draw, number
from echo_ray.evaluation.report import Origin, Report, as_json, rate_bar, subtitle, table, write
from echo_ray.evaluation.statistics import Rate, Spread
from echo_ray.out_folder import claim

REPORT = Report(
    what="thing",
    title="A thing measured",
    figures={
        "rates": {"all": Rate(3, 4), "none": Rate(0, 0)},
        "": {"mean": Spread(2, 1.5, 0.5), "wait": math.inf, "gap": math.nan, "name": "no"},
    },
    cases=[{"a": math.inf, "b": [1.0, math.nan], "c": Rate(1, 2)}],
    panels=[Bars("bars", [rate_bar("all", Rate(3, 4))])],
    notes=["A note."],
)
ORIGIN = Origin(
    preset="p", fingerprint="p/1/2", command="echo-ray evaluate thing", cases=4, seed=0, seconds=1
)


def picture(*panels: Bars | Lines) -> NDArray[np.uint8]:
    return np.array(Image.open(io.BytesIO(draw("title", "under", panels))))


def painted(pixels: NDArray[np.uint8], colour: int) -> int:
    """Pixels of a palette colour."""
    return int((np.abs(pixels.astype(int) - PALETTE[colour]).sum(axis=-1) < 12).sum())


def test_a_bar_is_as_high_as_its_value() -> None:
    half, whole = (painted(picture(Bars("b", [Bar("x", v)])), 0) for v in (0.5, 1.0))
    assert 1.9 < whole / half < 2.1
    assert painted(picture(Bars("b", [Bar("x", math.nan)])), 0) == 0
    assert painted(picture(Bars("b", [Bar("x", 1.0, tone=1)], legend=("a", "b"))), 1) > whole / 2


def test_bars_stand_together_over_one_label() -> None:
    pair = [Bar("x", 1.0), Bar("x", 0.5, tone=1)]
    apart, beside = (picture(Bars("b", pair, together=n)) for n in (1, 2))

    def columns(pixels: NDArray[np.uint8], colour: int) -> NDArray[np.int64]:
        return np.flatnonzero((pixels == PALETTE[colour]).all(axis=-1).sum(axis=0) > 50)

    gaps = [columns(p, 1).min() - columns(p, 0).max() for p in (apart, beside)]
    assert gaps[0] > 100
    assert 0 < gaps[1] < 10


@pytest.mark.parametrize(
    ("label", "lines"),
    [
        ("", [""]),
        ("as one", ["as one"]),
        ("memory frozen at its start", ["memory", "frozen at", "its start"]),
        ("regression_20", ["regression_", "20"]),
        ("a_b", ["a_b"]),
        ("sink - window_only", ["sink -", "window_", "only"]),
        ("unbreakable1", ["unbreakable1"]),
    ],
)
def test_labels_are_broken_where_they_may_be(label: str, lines: list[str]) -> None:
    assert broken(label, lambda words: len(words) <= 9) == lines


def test_a_line_goes_through_its_points_and_stops_at_gaps() -> None:
    flat = [(float(x), 0.5) for x in range(100)]
    pixels = picture(Lines("l", [Line("a", flat)], bottom=0.0, top=1.0))
    holes = [(x, y if x < 50 else math.nan) for x, y in flat]
    gap = picture(Lines("l", [Line("a", holes)], bottom=0.0, top=1.0))
    assert 0.3 < painted(gap, 0) / painted(pixels, 0) < 0.7
    rows = np.flatnonzero((np.abs(pixels.astype(int) - PALETTE[0]).sum(-1) < 12).sum(axis=1) > 200)
    assert len(rows) >= 1
    assert rows.max() - rows.min() < 6


@pytest.mark.parametrize(
    "panels",
    [
        [Bars("nothing", [])],
        [Lines("nothing", [])],
        [Lines("one point", [Line("a", [(3.0, 2.0)])], by_rank=True)],
        [Lines("nan", [Line("a", [(0.0, math.nan)])], marks=[("limit", 1.0)])],
        [Bars(f"{n}", [Bar("many words to break here", 0.2)] * n) for n in range(1, 10)],
    ],
)
def test_awkward_panels_are_drawn(panels: list[Bars | Lines]) -> None:
    assert picture(*panels).shape[2] == 3


def test_axes_have_round_steps_and_hold_their_values() -> None:
    assert axis([0.0, 1.0], 0.0, 1.0).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    found = axis([37.0, 412.0], None, None)
    assert found.ticks() == pytest.approx([0, 100, 200, 300, 400, 500])
    assert axis([5.0, 5.0], None, None).top > 5
    assert [number(v) for v in (0.12345, 1e-9, 12345.6, math.inf)] == [
        "0.123",
        "1e-09",
        "12,346",
        "-",
    ]


def test_the_table_shows_values_intervals_and_counts() -> None:
    lines = table(REPORT).splitlines()
    assert lines[0] == "A thing measured"
    assert lines[1].split() == ["value", "95", "%", "interval", "cases"]
    assert lines[3].split() == ["all", "75.0", "%", "30.1", "to", "95.4", "3/4"]
    assert lines[4].split() == ["none", "-", "0.0", "to", "100.0", "0/0"]
    assert [line.split()[1] for line in lines[5:9]] == ["1.5", "never", "-", "no"]
    assert lines[-1] == "A note."


def test_json_holds_everything_and_no_infinity(tmp_path: Path) -> None:
    data, image = write(REPORT, ORIGIN, tmp_path)
    body = json.loads(data.read_text(), parse_constant=lambda c: pytest.fail(c))
    assert body == json.loads(json.dumps(as_json(REPORT, ORIGIN)))
    assert body["figures"]["rates"]["all"]["hits"] == 3
    assert body["figures"][""]["wait"] is None
    assert body["cases"] == [
        {"a": None, "b": [1.0, None], "c": {**Rate(1, 2).figures()}},
    ]
    assert body["model"] == {"preset": "p", "fingerprint": "p/1/2"}
    assert body["command"] == "echo-ray evaluate thing"
    assert set(body["versions"]) == {"echo_ray", "python", "torch", "numpy", "pillow"}
    with Image.open(image) as opened:
        assert opened.size[0] > 400


def test_a_picture_says_how_many_cases_were_measured() -> None:
    assert subtitle(REPORT, ORIGIN) == "p  ·  p/1/2  ·  1 case, seed 0"
    many = replace(REPORT, cases=[{}] * 1914)
    assert subtitle(many, ORIGIN).endswith("1,914 cases, seed 0"), "not the 4 that were asked for"


def test_a_folder_that_takes_no_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "inside"):
        with pytest.raises(InvalidRequestError, match="cannot be written"):
            claim(folder)
    with pytest.raises(InvalidRequestError, match="cannot be written"):
        write(REPORT, ORIGIN, tmp_path / "not there")
    claim(tmp_path / "new" / "one")
    assert list((tmp_path / "new" / "one").iterdir()) == []
