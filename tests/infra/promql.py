"""Which series and labels an expression names, and whether the table has them."""

from __future__ import annotations

import re
from pathlib import Path

import promql_parser
import yaml

from echo_ray.serve.telemetry import TABLE

RECORDED = {
    rule["record"]
    for group in yaml.safe_load(
        (Path(__file__).parents[2] / "infra" / "prometheus" / "rules.yaml").read_text()
    )["groups"]
    for rule in group["rules"]
}
FROM_DISCOVERY = {"namespace", "job", "instance", "replica", "node", "pod"}
"""Labels that are put on when a process is found."""
FOREIGN = {"up": {"job"}, "ALERTS": {"alertname", "alertstate", "severity"}}
_NAME = re.compile(r"(?<![\w:\"])(echo_ray[:_][a-zA-Z0-9_:]+|up|ALERTS)(?![\w:(\"=])")
_GROUPED = re.compile(r"\b(?:by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_MATCHED = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"")


def _series() -> dict[str, set[str]]:
    """Labels of every series that is scraped or recorded."""
    known = {name: set(labels) for name, labels in FOREIGN.items()}
    for spec in TABLE:
        if spec.kind == "histogram":
            known[f"{spec.series}_bucket"] = {*spec.labels, "le"}
            known[f"{spec.series}_sum"] = known[f"{spec.series}_count"] = set(spec.labels)
        else:
            known[spec.series] = set(spec.labels)
    return known | {name: set() for name in RECORDED}


SERIES = _series()
ROWS = {
    name: spec.name
    for spec in TABLE
    for name in (spec.series, *(f"{spec.series}_{end}" for end in ("bucket", "sum", "count")))
}
"""The row of the table that a series belongs to."""


def names_of(expr: str) -> set[str]:
    """The series that an expression reads."""
    return set(_NAME.findall(expr))


def check(expr: str) -> list[str]:
    """What is wrong with an expression: series or labels that do not exist. Raises if no PromQL."""
    promql_parser.parse(expr)
    names = names_of(expr)
    wrong = [f"no series is called {name}" for name in sorted(names) if name not in SERIES]
    labels = set().union(*(SERIES.get(name, set()) for name in names)) | FROM_DISCOVERY
    used = set(_MATCHED.findall(expr))
    for group in _GROUPED.findall(expr):
        used |= {part.strip() for part in group.split(",") if part.strip()}
    return wrong + [f"no series here has a label {label}" for label in sorted(used - labels)]
