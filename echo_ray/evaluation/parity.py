"""Parity with the reference: runs a folder of fixtures (`echo-parity/1`) against our classes.

A case is a manifest `NAME.json` beside `NAME.safetensors`; everything about it (dimensions,
policy, steps, switches, tolerance) is read from the manifest, nothing is assumed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from echo_ray.errors import EchoError, InvalidRequestError
from echo_ray.evaluation import parity_cases

FORMAT = "echo-parity/1"


@dataclass(frozen=True, slots=True)
class Difference:
    """One compared tensor: the largest absolute difference, and whether every element passes."""

    name: str
    largest: float
    passed: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one case; `status` is pass, FAIL, not built or weights."""

    case: str
    kind: str
    status: str
    largest: float = 0.0
    tolerance: str = ""
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.status == "FAIL"

    def line(self) -> str:
        figures = f"{self.largest:9.2e}  {self.tolerance}" if self.tolerance else " " * 32
        return f"{self.case:40} {self.kind:18} {figures}  {self.status:9} {self.detail}".rstrip()


@dataclass(frozen=True, slots=True)
class Case:
    """A manifest with its tensors and, where it names some, its shared weights."""

    name: str
    manifest: dict[str, Any]
    tensors: dict[str, Tensor]
    weights: dict[str, Tensor]


Runner = Callable[[Case], dict[str, Tensor]]

RUNNERS: dict[
    str, Callable[[dict[str, Any], dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]
] = {
    "scheduler": parity_cases.scheduler,
    "relative_positions": parity_cases.relative_positions,
    "memory_encoder": parity_cases.memory_encoder,
    "dit_forward": parity_cases.dit_forward,
    "rollout": parity_cases.rollout,
}


def run_folder(folder: Path) -> Iterator[Verdict]:
    """Run every manifest of a folder, by name. Raises `InvalidRequestError` if it has none."""
    if not folder.is_dir():
        raise InvalidRequestError(f"{folder}: no such folder; give one with parity manifests")
    manifests = sorted(folder.glob("*.json"))
    if not manifests:
        raise InvalidRequestError(f"{folder}: no manifest (*.json) in this folder")
    for file in manifests:
        yield run_case(file)


def run_case(file: Path) -> Verdict:
    """Run one manifest; a case that cannot be read or run fails with the reason."""
    name = file.stem
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            return Verdict(name, "?", "FAIL", detail=f"not a manifest of format {FORMAT}")
        kind = str(manifest["kind"])
        if kind == "weights":
            return Verdict(name, kind, "weights", detail="(used by other cases)")
        if kind not in RUNNERS:
            return Verdict(name, kind, "not built", detail="(this kind has no implementation yet)")
        return _compare(name, kind, _load(file, manifest))
    except KeyError as e:
        return Verdict(name, "?", "FAIL", detail=f"manifest or tensors lack {e}")
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, EchoError) as e:
        return Verdict(name, "?", "FAIL", detail=f"{type(e).__name__}: {e}".splitlines()[0])


def _load(file: Path, manifest: dict[str, Any]) -> Case:
    tensors = load_file(file.with_name(manifest["tensors_file"]))
    weights_file = manifest.get("weights")
    weights = load_file(file.with_name(weights_file)) if weights_file else {}
    return Case(file.stem, manifest, tensors, weights)


def _compare(name: str, kind: str, case: Case) -> Verdict:
    with torch.inference_mode():
        actual = RUNNERS[kind](case.manifest, case.tensors, case.weights)
    tolerance = case.manifest["tolerance"]
    atol, rtol = float(tolerance["atol"]), float(tolerance["rtol"])
    required = case.manifest.get("required_outputs") or sorted(
        k for k in case.tensors if k.startswith("out.")
    )
    differences = [
        _difference(key, actual.get(key), case.tensors[key], _atol(key, atol), rtol)
        for key in required
    ]
    bad = [d for d in differences if not d.passed]
    table = actual.get("mismatch")
    detail = ", ".join(f"{d.name} off by {d.largest:.2e}" for d in bad)
    if table is not None and int(table):
        detail = f"{detail} {int(table)} table rows differ".strip()
    largest = max((d.largest for d in differences), default=0.0)
    status = "FAIL" if bad or (table is not None and int(table)) else "pass"
    return Verdict(name, kind, status, largest, f"atol {atol:.0e} rtol {rtol:.0e}", detail)


def _atol(key: str, atol: float) -> float:
    """Timesteps are a thousand times larger than noise levels; their manifest allows 1e-3."""
    return max(atol, 1e-3) if "timesteps" in key else atol


def _difference(
    key: str, actual: Tensor | None, expected: Tensor, atol: float, rtol: float
) -> Difference:
    if actual is None or actual.shape != expected.shape:
        return Difference(key, float("inf"), passed=False)
    gap = (actual.double() - expected.double()).abs()
    allowed = atol + rtol * expected.double().abs()
    passed = bool((gap <= allowed).all()) and bool(torch.isfinite(actual.double()).all())
    return Difference(key, float(gap.max()) if gap.numel() else 0.0, passed)
