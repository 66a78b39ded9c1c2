"""`docs/operations.md` names metrics and settings that exist."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from echo_ray.config import EchoConfig
from echo_ray.serve.telemetry import TABLE

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def test_metrics_of_the_page_are_in_the_table() -> None:
    named = set(re.findall(r"echo_ray_[a-z_]+_total", PAGE))
    assert len(named) >= 6
    assert named <= {spec.series for spec in TABLE}


def test_settings_of_the_page_exist() -> None:
    config = EchoConfig()
    sections = {f.name: getattr(config, f.name) for f in fields(config)}
    named = re.findall(r"\b(session|storage|http|limits|model)\.([a-z_]+)\b", PAGE)
    assert len(named) >= 4
    for section, key in named:
        assert hasattr(sections[section], key), f"{section}.{key}"
