"""What an instrument found: a table to read, figures to keep, a picture to look at."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from echo_ray import __version__
from echo_ray.evaluation.chart import Bar, Panel, draw
from echo_ray.evaluation.statistics import Rate, Spread
from echo_ray.out_folder import unwritable

FORMAT = "echo-ray/evaluation"
VERSION = 1

Figure = Rate | Spread | float | int | str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One instrument's findings; `figures` are rows of the table, by group and name."""

    what: str
    title: str
    figures: Mapping[str, Mapping[str, Figure]]
    cases: Sequence[Mapping[str, Any]]
    panels: Sequence[Panel]
    notes: Sequence[str] = ()
    """What a reader of the figures has to know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where the figures come from; written beside them."""

    preset: str
    fingerprint: str
    command: str
    cases: int
    seed: int
    seconds: float
    versions: Mapping[str, str] = field(default_factory=lambda: versions())


def versions() -> dict[str, str]:
    return {
        "echo_ray": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


def rate_bar(label: str, rate: Rate, tone: int = 0) -> Bar:
    """A bar with its interval, and its share above it."""
    low, high = rate.interval
    share = f"{100 * rate.value:.0f} %" if rate.cases else "no case"
    return Bar(label, rate.value, low, high, share, tone)


def table(report: Report) -> str:
    """The figures as aligned text: value, 95 % interval, counts."""
    rows: list[tuple[str, str, str, str]] = [("", "value", "95 % interval", "cases")]
    for group, figures in report.figures.items():
        if group:
            rows.append((group, "", "", ""))
        rows += [(f"  {name}" if group else name, *_cells(v)) for name, v in figures.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))]).rstrip()
        for row in rows
    ]
    return "\n".join([report.title, *lines, *report.notes])


def _cells(value: Figure) -> tuple[str, str, str]:
    if isinstance(value, Rate):
        low, high = value.interval
        shown = f"{100 * value.value:.1f} %" if value.cases else "-"
        return shown, f"{100 * low:.1f} to {100 * high:.1f}", f"{value.hits}/{value.cases}"
    if isinstance(value, Spread):
        return f"{_shown(value.mean)} ± {_shown(value.deviation)}", "", str(value.count)
    return _shown(value), "", ""


def _shown(value: float | int | str | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return "never" if math.isinf(value) else f"{value:.4g}"
    return str(value)


def as_json(report: Report, origin: Origin) -> dict[str, Any]:
    """Everything, in plain values; what is not a finite number is null."""
    figures = {
        group: {name: _plain(value) for name, value in rows.items()}
        for group, rows in report.figures.items()
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "what": report.what,
        "title": report.title,
        "model": {"preset": origin.preset, "fingerprint": origin.fingerprint},
        "command": origin.command,
        "versions": dict(origin.versions),
        "seed": origin.seed,
        "asked_cases": origin.cases,
        "seconds": round(origin.seconds, 1),
        "figures": figures,
        "notes": list(report.notes),
        "cases": [_plain(case) for case in report.cases],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Rate | Spread):
        return value.figures()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def subtitle(report: Report, origin: Origin) -> str:
    """The picture's second line: the model, and how many cases were measured."""
    count = len(report.cases)
    cases = f"{count:,} case{'s' if count != 1 else ''}, seed {origin.seed}"
    return f"{origin.preset}  ·  {origin.fingerprint}  ·  {cases}"


def write(report: Report, origin: Origin, out: Path) -> tuple[Path, Path]:
    """Write `WHAT.json` and `WHAT.png` into a folder that `claim` has made; returns both."""
    data, picture = out / f"{report.what}.json", out / f"{report.what}.png"
    text = json.dumps(as_json(report, origin), indent=1, allow_nan=False, ensure_ascii=False)
    try:
        data.write_text(text + "\n", encoding="utf-8")
        picture.write_bytes(draw(report.title, subtitle(report, origin), report.panels))
    except OSError as e:
        raise unwritable(out, e) from e
    return data, picture
