"""What the chart renders from each file of `helm/ci`, to be read in review. UPDATE=1 rewrites."""

from __future__ import annotations

from pathlib import Path

import pytest
from charts import CI, UPDATE, manifests, render, values

GOLDEN = Path(__file__).parent / "golden"
RENDERED = [(name, kind) for name in CI for kind in ("objects.yaml", "notes.txt")]


@pytest.mark.parametrize(("name", "kind"), RENDERED)
def test_a_render_is_as_it_was(name: str, kind: str) -> None:
    given = values(name)
    # Rules and dashboards are files of infra/, with tests of their own.
    now = manifests(given, without=("dashboards.yaml", "prometheusrule.yaml"))
    if kind == "notes.txt":
        now = render(given)["NOTES.txt"] + "\n"
    file = GOLDEN / f"{name}.{kind}"
    if UPDATE:
        file.write_text(now)
    assert file.is_file(), f"{file} is missing; UPDATE=1 pytest tests/helm writes it"
    assert now == file.read_text()


def test_every_golden_file_has_its_values() -> None:
    assert {f.name for f in GOLDEN.iterdir()} == {f"{n}.{k}" for n, k in RENDERED}
