"""The chart's README and values.yaml say the same. UPDATE=1 rewrites the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from chart_readme import page, read
from charts import CHART, UPDATE

README = CHART / "README.md"
# Commented as a whole: whoever reads about one knows the keys.
WHOLE = ("head", "workerGroups", "pods.securityContext", "dashboards.labels")


def leaves(node: dict[str, Any], at: str = "") -> Iterator[str]:
    for key, value in node.items():
        path = f"{at}{key}"
        if isinstance(value, dict) and value and path not in WHOLE:
            yield from leaves(value, f"{path}.")
        else:
            yield path


def test_the_page_is_up_to_date() -> None:
    if UPDATE:
        README.write_text(page())
    assert README.read_text() == page(), "UPDATE=1 pytest tests/helm writes it again"


def test_every_value_is_told_of() -> None:
    told = {row.path for row in read()}
    assert len(told) == len(read())
    assert set(leaves(yaml.safe_load((CHART / "values.yaml").read_text()))) - told == set()


def test_files_are_short() -> None:
    assert len((CHART / "values.yaml").read_text().splitlines()) <= 200
    for file in (CHART / "templates").iterdir():
        assert len(file.read_text().splitlines()) <= 120, file.name


def test_every_value_is_read_by_a_template() -> None:
    templates = "".join(f.read_text() for f in (CHART / "templates").iterdir())
    unread = [
        path
        for path in leaves(yaml.safe_load((CHART / "values.yaml").read_text()))
        if path.rpartition(".")[2] not in templates
    ]
    assert unread == []
