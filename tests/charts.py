"""The chart, rendered in process by Helm's own library: no cluster, no helm command."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import helm_python
import yaml

ROOT = Path(__file__).parents[1]
CHART = ROOT / "helm"
CI = {f.name.removesuffix("-values.yaml"): f for f in sorted((CHART / "ci").glob("*.yaml"))}
UPDATE = os.environ.get("UPDATE") == "1"
RELEASE, NAMESPACE = "demo", "video"


def values(name: str) -> dict[str, Any]:
    """A file of `helm/ci`, to be changed at will."""
    found: dict[str, Any] = yaml.safe_load(CI[name].read_text())
    return found


def changed(name: str, path: str, value: object) -> dict[str, Any]:
    """A file of `helm/ci` with one value at a dotted path set."""
    found = copy.deepcopy(values(name))
    node = found
    *parents, last = path.split("/")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return found


@functools.cache
def _chart(folder: Path) -> helm_python.Chart:
    return helm_python.Chart.load(folder)


def render(given: Mapping[str, Any], folder: Path = CHART, name: str = RELEASE) -> dict[str, str]:
    """Rendered templates by file name, without the empty ones; raises `HelmError`."""
    chart = _chart(folder)
    chart.validate_schema(dict(given))
    found = chart.render(dict(given), name=name, namespace=NAMESPACE)
    return {Path(k).name: v.strip() for k, v in sorted(found.items()) if v.strip()}


def manifests(given: Mapping[str, Any], without: Sequence[str] = (), **where: Any) -> str:
    """All objects as one stream of YAML, but those of the templates `without`."""
    found = render(given, **where)
    left_out = {"NOTES.txt", *without}
    parts = [v.removeprefix("---\n") for k, v in found.items() if k not in left_out]
    return "---\n" + "\n---\n".join(parts) + "\n"


def objects(given: Mapping[str, Any], **where: Any) -> list[dict[str, Any]]:
    """All objects, parsed."""
    return [doc for doc in yaml.load_all(manifests(given, **where), Loader=yaml.CSafeLoader) if doc]


def one(docs: list[dict[str, Any]], kind: str, name: str | None = None) -> dict[str, Any]:
    """The only object of a kind, or the one of that name."""
    (found,) = (d for d in docs if d["kind"] == kind and name in (None, d["metadata"]["name"]))
    return found


def application(docs: list[dict[str, Any]]) -> dict[str, Any]:
    """The one application of the RayService's Serve configuration."""
    config = yaml.safe_load(one(docs, "RayService")["spec"]["serveConfigV2"])
    (app,) = config["applications"]
    found: dict[str, Any] = app
    return found


def pods(docs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Pod templates of the RayService by group name, `head` among them."""
    cluster = one(docs, "RayService")["spec"]["rayClusterConfig"]
    found = {g["groupName"]: g["template"] for g in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **found}
