"""What a benchmark hands out: tables, samples and checks, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Value = float | int | str | None
NOT_MEASURED = "not measured"
DRY_RUN = "dry run on a CPU: no figure here says anything about a GPU"


@dataclass(slots=True)
class Table:
    """Rows of values under named columns; a missing value is said to be one."""

    title: str
    columns: Sequence[str]
    rows: list[Mapping[str, Value]] = field(default_factory=list)

    def add(self, row: Mapping[str, Value] | None = None, /, **values: Value) -> None:
        """A row, by column. Raises `KeyError` for a column that is not the table's."""
        whole = {**(row or {}), **values}
        if surplus := set(whole) - set(self.columns):
            raise KeyError(f"table {self.title!r} has no column {sorted(surplus)[0]!r}")
        self.rows.append(whole)

    def cells(self) -> list[list[str]]:
        return [[shown(row.get(name)) for name in self.columns] for row in self.rows]


@dataclass(frozen=True, slots=True)
class Check:
    """Something that has to be so; one that is not makes the whole run red."""

    what: str
    passed: bool
    detail: str


@dataclass(slots=True)
class Outcome:
    """What one stage found."""

    stage: str
    status: str = "done"
    """done, skipped or failed."""
    reason: str = ""
    seconds: float = 0.0
    tables: list[Table] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=dict)
    """Every single time, in milliseconds, by what was timed."""
    figures: dict[str, float] = field(default_factory=dict)
    """Numbers that later stages and the goals' table read."""
    skipped: list[str] = field(default_factory=list)
    """What did not fit or cannot run here, with the reason."""

    def table(self, title: str, *columns: str) -> Table:
        made = Table(title, columns)
        self.tables.append(made)
        return made

    @property
    def red(self) -> bool:
        return any(not check.passed for check in self.checks)


def shown(value: Value) -> str:
    """A value as a cell: three digits that count, whole numbers whole."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    if value and (abs(value) < 0.01 or abs(value) >= 1e6):
        return f"{value:.2e}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
