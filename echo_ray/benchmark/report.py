"""A run on the terminal, as JSON and as a page; nothing but its checks where one of them is red."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from echo_ray.benchmark.goals import derived, goals_table, verdict
from echo_ray.benchmark.result import DRY_RUN, Outcome, Table
from echo_ray.out_folder import unwritable

FORMAT = "echo-bench/1"
RED = "RED: a check failed, so no speed is told"


@dataclass(frozen=True, slots=True)
class Run:
    """All of one benchmark."""

    command: str
    when: str
    """Date and time, UTC."""
    settings: Mapping[str, Any]
    device: Mapping[str, str]
    after: Mapping[str, str]
    """The device's facts at the end, clocks and power among them."""
    dry: bool
    frames_per_chunk: int
    outcomes: Sequence[Outcome] = field(default_factory=list)

    @property
    def red(self) -> bool:
        return any(o.red or o.status == "failed" for o in self.outcomes)

    @property
    def figures(self) -> dict[str, float]:
        merged: dict[str, float] = {}
        for outcome in self.outcomes:
            merged |= outcome.figures
        return derived(merged, self.frames_per_chunk)


def lines(run: Run) -> Iterator[str]:
    """The run as text for a terminal."""
    if run.dry:
        yield DRY_RUN
    for outcome in run.outcomes:
        yield from _checks(outcome)
    if run.red:
        yield RED
        return
    for outcome in run.outcomes:
        for table in outcome.tables:
            yield ""
            yield table.title
            yield from _aligned(table)
        yield from (f"  skipped: {reason}" for reason in outcome.skipped)
        if outcome.status == "skipped":
            yield f"\nstage {outcome.stage} skipped: {outcome.reason}"
    yield ""
    goals = goals_table(as_json(run))
    yield goals.title
    yield from _aligned(goals)
    yield verdict(goals)
    if run.dry:
        yield DRY_RUN


def _checks(outcome: Outcome) -> Iterator[str]:
    for check in outcome.checks:
        yield f"{'pass' if check.passed else 'FAIL'}  {check.what}: {check.detail}"
    if outcome.status == "failed":
        yield f"FAIL  stage {outcome.stage}: {outcome.reason}"


def _aligned(table: Table) -> Iterator[str]:
    rows = [list(table.columns), *table.cells()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
    for row in rows:
        yield "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()


def as_json(run: Run) -> dict[str, Any]:
    """Everything, every sample included; of a red run what was checked and no time."""
    stages = []
    for outcome in run.outcomes:
        whole = asdict(outcome)
        if run.red:
            whole = {k: whole[k] for k in ("stage", "status", "reason", "checks", "skipped")}
        stages.append(whole)
    return {
        "format": FORMAT,
        "dry_run": DRY_RUN if run.dry else None,
        "red": run.red,
        "when": run.when,
        "command": run.command,
        "settings": dict(run.settings),
        "device": dict(run.device),
        "device_after": dict(run.after),
        "figures": {} if run.red else run.figures,
        "stages": stages,
    }


def as_page(run: Run) -> str:
    """The run as Markdown, ready for docs/benchmarks."""
    parts = [f"# {run.device.get('device', 'unknown device')}, {run.when[:10]}", ""]
    if run.dry:
        parts += [f"**{DRY_RUN}**", ""]
    parts += [f"`{run.command}`, {run.when} UTC. [How to read it](README.md).", ""]
    parts += ["## Checks", ""]
    parts += [f"- {line}" for outcome in run.outcomes for line in _checks(outcome)]
    if run.red:
        return "\n".join([*parts, "", f"**{RED}.**", ""])
    parts += ["", *goals_page(as_json(run))]
    for table in (table for outcome in run.outcomes for table in outcome.tables):
        parts += ["", f"## {table.title}", "", *_markdown(table)]
    left_out = [f"- {o.stage}: {o.reason}" for o in run.outcomes if o.status == "skipped"]
    left_out += [f"- {o.stage}: {reason}" for o in run.outcomes for reason in o.skipped]
    if left_out:
        parts += ["", "## Left out", "", *left_out]
    return "\n".join([*parts, ""])


def goals_page(data: Mapping[str, Any]) -> list[str]:
    """The goals' part of a page, from a run's JSON; of none, that nothing was measured."""
    goals = goals_table(data)
    return [f"**{verdict(goals)}.**", "", f"## {goals.title}", "", *_markdown(goals)]


def _markdown(table: Table) -> Iterator[str]:
    yield f"| {' | '.join(table.columns)} |"
    yield "|" + "---|" * len(table.columns)
    for cells in table.cells():
        yield "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def page_name(run: Run) -> str:
    """`<device>_<yyyymm>.md`."""
    name = re.sub(r"[^a-z0-9]+", "-", run.device.get("device", "unknown").lower()).strip("-")
    return f"{'dry-run_' if run.dry else ''}{name}_{run.when[:4]}{run.when[5:7]}.md"


def write(run: Run, out: Path) -> list[Path]:
    """The JSON and the page; gives their paths. Raises `InvalidRequestError`."""
    files = {"bench.json": json.dumps(as_json(run), indent=1) + "\n", page_name(run): as_page(run)}
    try:
        for name, text in files.items():
            (out / name).write_text(text, encoding="utf-8")
    except OSError as e:
        raise unwritable(out, e) from e
    return [out / name for name in files]
