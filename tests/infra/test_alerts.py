"""Alerts fire when they should, and then only; each has a runbook and names what exists."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from infra.alert_cases import CASES, HOUR
from infra.promql import check, names_of

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra" / "prometheus"
FILES = [FOLDER / "rules.yaml", FOLDER / "alerts.yaml"]
RULES: list[dict[str, Any]] = [
    rule
    for file in FILES
    for group in yaml.safe_load(file.read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RUNBOOK = (ROOT / "docs" / "operations.md").read_text()

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (package prometheus)"
)


def promtool(*arguments: str, cwd: Path) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=50
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.get("alert") or r["record"])
def test_every_rule_parses_and_names_series_and_labels_that_exist(rule: dict[str, Any]) -> None:
    assert check(rule["expr"]) == []
    assert names_of(rule["expr"])


@pytest.mark.parametrize(
    ("expr", "wrong"),
    [
        ("rate(echo_ray_nothing_total[5m])", "echo_ray_nothing_total"),
        ('echo_ray_viewers{session="x"}', "session"),
        ("sum by (color) (echo_ray_viewers)", "color"),
        ("echo_ray:nothing", "echo_ray:nothing"),
        ("histogram_quantile(0.5, rate(echo_ray_drift_score[5m]))", "echo_ray_drift_score"),
    ],
)
def test_what_does_not_exist_is_found(expr: str, wrong: str) -> None:
    assert wrong in " ".join(check(expr))


def test_what_does_not_parse_is_refused() -> None:
    with pytest.raises(ValueError, match="parenthesis"):
        promql_parser.parse("sum by (rate(")


@pytest.mark.parametrize("alert", ALERTS.values(), ids=lambda a: a["alert"])
def test_every_alert_says_how_bad_it_is_what_it_means_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    assert alert["annotations"]["description"].endswith(".")
    anchor = alert["alert"].lower()
    assert alert["annotations"]["runbook_url"] == f"docs/operations.md#{anchor}"


def test_every_alert_has_its_runbook_and_the_other_way_round() -> None:
    headings = re.findall(r"^### (EchoRay\w+)$", RUNBOOK, re.MULTILINE)
    assert len(headings) == len(set(headings))
    assert set(headings) == set(ALERTS)


def test_every_alert_has_a_case() -> None:
    assert set(CASES) == set(ALERTS)


@needs_promtool
def test_the_rules_are_accepted_by_prometheus(tmp_path: Path) -> None:
    promtool("check", "rules", "--lint=all", *map(str, FILES), cwd=tmp_path)
    promtool("check", "config", str(FOLDER / "prometheus.yml"), cwd=tmp_path)


@needs_promtool
def test_every_alert_is_quiet_before_fires_and_clears(tmp_path: Path) -> None:
    files = []
    for alert, series in CASES.items():
        # Only what it needs: each case evaluates every rule of its file for four hours.
        rules = [rule for rule in RULES if rule.get("alert", alert) == alert]
        written = {"groups": [{"name": "all", "rules": rules}]}
        (tmp_path / f"{alert}.rules.yaml").write_text(yaml.safe_dump(written))
        expected = [(HOUR - 1, False), (2 * HOUR - 1, True), (4 * HOUR - 1, False)]
        case = {
            "name": alert,
            "interval": "1m",
            "input_series": [{"series": s.selector, "values": s.values()} for s in series],
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})',
                    "eval_time": f"{minute}m",
                    "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
                }
                for minute, fires in expected
            ],
        }
        whole = {"rule_files": [f"{alert}.rules.yaml"], "tests": [case]}
        files.append(f"{alert}.yaml")
        (tmp_path / files[-1]).write_text(yaml.safe_dump(whole))
    promtool("test", "rules", *files, cwd=tmp_path)
