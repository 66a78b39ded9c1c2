"""`helm/README.md` out of the comments of `helm/values.yaml`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from charts import CHART

_KEY = re.compile(r"(?P<indent> *)(?P<key>[A-Za-z][\w./-]*):(?P<rest>.*)")
LONGEST_DEFAULT = 60

HEAD = """\
# Helm chart

The service as a RayService of KubeRay 1.5 or newer. Installing, sizing, upgrading, rotating secrets
and backing up are in [docs/operations.md](../docs/operations.md#install-on-kubernetes).

    helm install NAME helm/ --values my-values.yaml

`ci/` holds values to begin with: `minimal` is what must be named, `cpu-dev` runs without GPUs and
S3, `full` has everything on. A value that is unknown or cannot be is refused by
`values.schema.json`; values that cannot go together are refused with what to change.

What Serve runs is `deployments/cluster.yaml`, read as `files/serve.yaml`; rules and dashboards are
those of `infra/`. Nothing of them is copied into the chart.

This page is made from the comments of `values.yaml`: `UPDATE=1 pytest tests/helm` writes it again.

| value | default | |
|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """One commented value."""

    path: str
    default: str
    says: str


def page() -> str:
    """The whole README."""
    rows = [f"| `{r.path}` | {r.default} | {r.says} |" for r in read()]
    return HEAD + "\n".join(rows) + "\n"


def read() -> list[Row]:
    """Every commented key of values.yaml, in its order."""
    text = (CHART / "values.yaml").read_text()
    defaults = yaml.safe_load(text)
    return [Row(path, _shown(_at(defaults, path)), says) for path, says in _comments(text)]


def _comments(text: str) -> Iterator[tuple[str, str]]:
    """Paths of commented keys with their comments: those above a key, or behind it."""
    parents: list[tuple[int, str]] = []
    above: list[str] = []
    for line in text.splitlines():
        if line.strip().startswith("#"):
            above.append(line.strip().removeprefix("#").strip())
            continue
        found = _KEY.fullmatch(line)
        if found is not None:
            depth = len(found["indent"])
            parents = [p for p in parents if p[0] < depth] + [(depth, found["key"])]
            behind = found["rest"].partition("  # ")[2]
            says = " ".join([*above, behind]).strip()
            if says:
                yield ".".join(key for _, key in parents), says
        above = []


def _at(node: Any, path: str) -> Any:
    for key in path.split("."):
        node = node[key]
    return node


def _shown(value: Any) -> str:
    if value == "" or (isinstance(value, dict) and value):
        return ""
    text = json.dumps(value) if isinstance(value, dict | list) else str(value)
    text = {"True": "true", "False": "false"}.get(text, text).replace("|", "\\|")
    return f"`{text}`" if len(text) <= LONGEST_DEFAULT else ""
