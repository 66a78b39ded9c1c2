"""What a run showed: losses, waits and stalls by kind of fault, as a table, JSON and Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from chaos.faults import Fault
from chaos.viewers import Show, Viewing

from echo_ray.session.engine_port import StreamShape

BUFFER_S = 2.0
UNDISTURBED = "undisturbed"
OVERDUE_S = 0.6
"""A viewer that has waited so long for a segment is not to be blamed on the next fault."""
GOALS_S = {"replica killed": 1.0, "node killed": 1.0, "replica hung": 2.0, "router hung": 2.0}
"""Longest wait for the next frame. A planned migration is to stall nobody."""
SEAMLESS = "planned migration"


@dataclass
class Losses:
    """Segments that are not as an undisturbed run has them."""

    lost: int = 0
    duplicated: int = 0
    differing: int = 0

    @property
    def any(self) -> bool:
        return bool(self.lost or self.duplicated or self.differing)


@dataclass
class Window:
    """From one fault to the next: what viewers met in it."""

    fault: Fault
    wait_s: float = 0.0
    """The longest that any viewer waited for a segment, from the fault on."""
    stalls: int = 0
    stall_s: float = 0.0
    lag_s: float = 0.0
    """The longest that this process itself was held up meanwhile."""


@dataclass
class Findings:
    """All of it."""

    seed: int
    engine: str
    took_s: float
    sessions: int = 0
    viewers: int = 0
    segments: int = 0
    switches: int = 0
    losses: Losses = field(default_factory=Losses)
    windows: list[Window] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """What must not be: viewers that could not go on, requests refused for good."""
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.losses.any or bool(self.broken) or not self.segments


def losses(viewing: Viewing, truth: Sequence[str], last: int) -> Losses:
    """Compare one viewer with the undisturbed run of chunks 0 to `last`."""
    seen = viewing.indices
    return Losses(
        lost=len(set(range(last + 1)) - set(seen)),
        duplicated=len(seen) - len(set(seen)) + sum(b < a for a, b in pairwise(seen)),
        differing=sum(
            truth[i] != digest or i in viewing.marked
            for i, digest in zip(seen, viewing.digests, strict=True)
        ),
    )


def waits(windows: Sequence[Window], viewing: Viewing) -> Iterator[tuple[Window, float]]:
    """Every wait for a segment, with the window that is to blame, counted from its fault at most.

    To blame is the last fault before the segment came, unless it had been overdue by then already.
    """
    for before, after in pairwise(viewing.arrivals):
        for window in reversed(windows):
            if window.fault.at < after and window.fault.at - before < OVERDUE_S:
                yield window, after - max(before, window.fault.at)
                break
        else:
            yield windows[0], 0.0


def stalls(viewing: Viewing, shape: StreamShape) -> list[float]:
    """By segment: how long playout stood still for it, had it begun `BUFFER_S` after the first."""
    begin, stood = viewing.arrivals[0] + BUFFER_S if viewing.arrivals else 0.0, []
    for index, arrival in zip(viewing.indices, viewing.arrivals, strict=True):
        late = max(0.0, arrival - (begin + shape.start_s(index)))
        begin += late
        stood.append(late)
    return stood


def examine(findings: Findings, shows: Sequence[Show], shape: StreamShape, engine: Any) -> None:
    """Fill in what the shows say; the engine makes the undisturbed runs."""
    for show in shows:
        truth = show.truth(engine)
        last = show.last if show.last is not None else len(truth) - 1
        findings.sessions += 1
        findings.switches += sum(len(p) for chunk, p in show.switches.items() if chunk <= last)
        for viewing in show.viewings:
            found = losses(viewing, truth, last)
            findings.viewers += 1
            findings.segments += len(viewing.indices)
            findings.losses.lost += found.lost
            findings.losses.duplicated += found.duplicated
            findings.losses.differing += found.differing
            if found.any or viewing.broken:
                what = f"{viewing.name}: {asdict(found)}, marked {viewing.marked}"
                findings.broken.append(f"{what}, {viewing.broken or 'read to its end'}")
            _place(findings.windows, viewing, shape)


def _place(windows: Sequence[Window], viewing: Viewing, shape: StreamShape) -> None:
    stood = stalls(viewing, shape)[1:]
    for (window, waited), late in zip(waits(windows, viewing), stood, strict=True):
        window.wait_s = max(window.wait_s, waited)
        window.stalls += late > 0
        window.stall_s += late


# Shown


def rows(findings: Findings) -> list[list[str]]:
    """The table, its heading first."""
    shown = [
        [
            "fault", "times", "lasted s", "next frame s: median", "p95", "worst", "goal",
            "stalls", "stalled s",
        ]
    ]  # fmt: skip
    kinds = sorted({w.fault.kind for w in findings.windows} - {UNDISTURBED})
    for kind in [UNDISTURBED, *kinds]:
        these = [w for w in findings.windows if w.fault.kind == kind]
        if not these:
            continue
        waited = sorted(w.wait_s for w in these)
        shown.append(
            [
                kind,
                str(len(these)),
                f"{median(w.fault.lasted_s for w in these):.1f}",
                f"{median(waited):.2f}",
                f"{_percentile(waited, 0.95):.2f}",
                f"{waited[-1]:.2f}",
                goal(kind, these),
                str(sum(w.stalls for w in these)),
                f"{sum(w.stall_s for w in these):.1f}",
            ]
        )
    return shown


def goal(kind: str, windows: Sequence[Window]) -> str:
    """How many of its faults met the goal of a kind, or nothing if it has none."""
    if kind == SEAMLESS:
        met = sum(w.stalls == 0 for w in windows)
        return f"no stall: {met} of {len(windows)}"
    if kind not in GOALS_S:
        return ""
    met = sum(w.wait_s <= GOALS_S[kind] for w in windows)
    return f"{GOALS_S[kind]:g} s: {met} of {len(windows)}"


def headline(findings: Findings) -> str:
    f, found = findings, findings.losses
    faults = sum(w.fault.kind != UNDISTURBED for w in f.windows)
    return (
        f"{faults} faults in {f.took_s / 60:.1f} min (seed {f.seed}, {f.engine} engine); "
        f"{f.viewers} viewers of {f.sessions} sessions, {f.segments} segments, "
        f"{f.switches} prompt switches\n"
        f"segments lost / duplicated / differing: "
        f"{found.lost} / {found.duplicated} / {found.differing}"
    )


def table(findings: Findings) -> str:
    cells = rows(findings)
    widths = [max(len(row[n]) for row in cells) for n in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def markdown(findings: Findings) -> str:
    heading, *rest = rows(findings)
    lines = ["| " + " | ".join(row) + " |" for row in rest]
    parts = [
        f"# Chaos, seed {findings.seed}",
        headline(findings),
        "\n".join(["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading), *lines]),
        *(f"- BROKEN: {text}" for text in findings.broken),
        *(f"- {text}" for text in findings.notes),
    ]
    return "\n\n".join(parts) + "\n"


def write(findings: Findings, out: Path) -> None:
    """`chaos.json` and `chaos.md` in the folder."""
    out.mkdir(parents=True, exist_ok=True)
    began = findings.windows[0].fault.at if findings.windows else 0.0
    plain = asdict(findings)
    for window in plain["windows"]:
        window["fault"]["at"] = round(window["fault"]["at"] - began, 3)
    (out / "chaos.json").write_text(json.dumps(plain, indent=1) + "\n")
    (out / "chaos.md").write_text(markdown(findings))


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
