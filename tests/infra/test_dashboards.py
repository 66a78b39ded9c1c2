"""Dashboards are what their table says, name only what exists, and leave no metric out."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from infra.promql import ROWS, check, names_of
from infra.test_alerts import RULES

from echo_ray.serve.telemetry import TABLE

FOLDER = Path(__file__).parents[2] / "infra" / "grafana"
FILES = sorted((FOLDER / "dashboards").glob("*.json"))
BOARDS: dict[str, dict[str, Any]] = {f.stem: json.loads(f.read_text()) for f in FILES}
PANELS = [(name, panel) for name, board in BOARDS.items() for panel in board["panels"]]
UNITS = {"short", "s", "percentunit", "bytes", "Bps", "reqps"}


def plain(expr: str, window: str = "1m") -> str:
    """The expression with Grafana's variables filled in as for everything."""
    return expr.replace("$__rate_interval", window).replace("$namespace", ".*")


def test_there_are_the_four() -> None:
    assert set(BOARDS) == {"fleet", "replica", "recovery", "drift"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_files_are_as_written_from_the_table(file: Path) -> None:
    source = FOLDER / "dashboards.py"
    spec = importlib.util.spec_from_file_location("dashboards_table", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    assert file.read_text() == module.rendered(file.stem), f"run python {source}"


@pytest.mark.parametrize("name", BOARDS)
def test_grafana_can_take_it_as_it_is(name: str) -> None:
    board = BOARDS[name]
    assert (board["uid"], board["id"]) == (f"echo-ray-{name}", None)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids)) == len({panel["title"] for panel in board["panels"]})
    assert [v["name"] for v in board["templating"]["list"]] == ["datasource", "namespace"]
    assert len(json.dumps(board)) < 100_000


@pytest.mark.parametrize(("board", "panel"), PANELS, ids=lambda p: p if isinstance(p, str) else "")
def test_every_panel_names_what_exists_in_a_unit_with_legends(
    board: str, panel: dict[str, Any]
) -> None:
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert panel["datasource"]["uid"] == "${datasource}"
    for target in panel["targets"]:
        assert target["datasource"]["uid"] == "${datasource}"
        assert target["legendFormat"]
        assert check(plain(target["expr"])) == []
        assert "$namespace" in target["expr"] or "ALERTS" in target["expr"]


def test_every_metric_is_on_a_dashboard_or_in_an_alert() -> None:
    expressions = [t["expr"] for _, panel in PANELS for t in panel["targets"]]
    expressions += [rule["expr"] for rule in RULES]
    shown = {ROWS[name] for e in expressions for name in names_of(e) if name in ROWS}
    assert {spec.name for spec in TABLE} - shown == set()


def test_the_runbooks_name_panels_that_exist() -> None:
    page = (FOLDER.parents[1] / "docs" / "operations.md").read_text()
    headings = set(re.findall(r"^#+ (.+)$", page, re.MULTILINE))
    quoted = re.findall(r'"([A-Z][^"]+)"', page.split("\n## Alerts\n")[1].split("\n## ")[0])
    named = {re.sub(r"\s+", " ", title) for title in quoted}
    assert len(named) > 8
    assert named <= headings | {panel["title"] for _, panel in PANELS}
