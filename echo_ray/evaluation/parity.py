"""Parity with the reference: runs a folder of fixtures (`echo-parity/1`) against our classes.

A case is a manifest `NAME.json` beside `NAME.safetensors`; everything about it (dimensions,
policy, steps, switches, tolerance) is read from the manifest, nothing is assumed.

In float32 every element has to be within the manifest's tolerance, on a CPU or a GPU. In bfloat16
that says nothing, for one rounding is larger than it: there the whole output is compared, its
distance from the expected one as a share of the expected one's size, against `BF16_SHARES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from echo_ray.errors import EchoError, InvalidRequestError
from echo_ray.evaluation import parity_cases, parity_published

FORMAT = "echo-parity/1"


@dataclass(frozen=True, slots=True)
class Target:
    """Where the cases run, and in which arithmetic."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors for the run; timesteps stay as they are, bfloat16 has not their digits."""
        return {
            k: v.to(self.device, self.dtype if _is_rounded(k, v) else v.dtype)
            for k, v in tensors.items()
        }


def _is_rounded(name: str, tensor: Tensor) -> bool:
    exact = ("timestep", "in.mean", "in.std")
    return tensor.is_floating_point() and not any(e in name for e in exact)


@dataclass(frozen=True, slots=True)
class Difference:
    """One compared tensor: the largest difference or share, and whether it passes."""

    name: str
    largest: float
    passed: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one case; `status` is pass, FAIL or weights."""

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
        figures = f"{self.largest:9.2e}  {self.tolerance:22}" if self.tolerance else " " * 33
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
    "lora_rollout": parity_published.lora_rollout,
    "vae": parity_published.vae,
    "umt5_encoder": parity_published.umt5_encoder,
}

BF16_SHARES = {
    "scheduler": 0.006,
    "relative_positions": 0.005,
    "memory_encoder": 0.03,
    "dit_forward": 0.02,
    "rollout": 0.02,
    "lora_rollout": 0.02,
    "vae": 0.07,
    "umt5_encoder": 0.02,
}
"""About twice what a CPU's bfloat16 gives. The VAE's case has four channels and 32 layers."""


def run_folder(folder: Path, target: Target | None = None) -> Iterator[Verdict]:
    """Run every manifest of a folder, by name. Raises `InvalidRequestError` if it has none."""
    if not folder.is_dir():
        raise InvalidRequestError(f"{folder}: no such folder; give one with parity manifests")
    manifests = sorted(folder.glob("*.json"))
    if not manifests:
        raise InvalidRequestError(f"{folder}: no manifest (*.json) in this folder")
    for file in manifests:
        yield run_case(file, target)


def run_case(file: Path, target: Target | None = None) -> Verdict:
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
            return Verdict(name, kind, "FAIL", detail=f"unknown kind; known: {', '.join(RUNNERS)}")
        return _compare(name, kind, _load(file, manifest), target or Target())
    except KeyError as e:
        return Verdict(name, "?", "FAIL", detail=f"manifest or tensors lack {e}")
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, EchoError) as e:
        return Verdict(name, "?", "FAIL", detail=f"{type(e).__name__}: {e}".splitlines()[0])


def _load(file: Path, manifest: dict[str, Any]) -> Case:
    tensors = load_file(file.with_name(manifest["tensors_file"]))
    weights_file = manifest.get("weights")
    weights = load_file(file.with_name(weights_file)) if weights_file else {}
    return Case(file.stem, manifest, tensors, weights)


def _compare(name: str, kind: str, case: Case, target: Target) -> Verdict:
    with torch.inference_mode():
        actual = RUNNERS[kind](case.manifest, target.take(case.tensors), target.take(case.weights))
    tolerance = case.manifest["tolerance"]
    atol, rtol = float(tolerance["atol"]), float(tolerance["rtol"])
    required = case.manifest.get("required_outputs") or sorted(
        k for k in case.tensors if k.startswith("out.")
    )
    rounded = target.dtype != torch.float32
    share = BF16_SHARES[kind]
    differences = [
        _share(key, actual.get(key), case.tensors[key], share)
        if rounded
        else _difference(key, actual.get(key), case.tensors[key], _atol(key, atol), rtol)
        for key in required
    ]
    bad = [d for d in differences if not d.passed]
    table = actual.get("mismatch")
    detail = ", ".join(f"{d.name} off by {d.largest:.2e}" for d in bad)
    if table is not None and int(table):
        detail = f"{detail} {int(table)} table rows differ".strip()
    largest = max((d.largest for d in differences), default=0.0)
    status = "FAIL" if bad or (table is not None and int(table)) else "pass"
    allowed = f"share {share:g}" if rounded else f"atol {atol:.0e} rtol {rtol:.0e}"
    return Verdict(name, kind, status, largest, allowed, detail)


def _share(key: str, actual: Tensor | None, expected: Tensor, allowed: float) -> Difference:
    """The distance from the expected tensor, as a share of that tensor's size."""
    if actual is None or actual.shape != expected.shape:
        return Difference(key, float("inf"), passed=False)
    gap = actual.to("cpu", torch.float64) - expected.double()
    share = float(gap.norm() / expected.double().norm().clamp_min(1e-12))
    return Difference(key, share, passed=share <= allowed)


def _atol(key: str, atol: float) -> float:
    """Timesteps are a thousand times larger than noise levels; their manifest allows 1e-3."""
    return max(atol, 1e-3) if "timesteps" in key else atol


def _difference(
    key: str, actual: Tensor | None, expected: Tensor, atol: float, rtol: float
) -> Difference:
    if actual is None or actual.shape != expected.shape:
        return Difference(key, float("inf"), passed=False)
    given = actual.to("cpu", torch.float64)
    gap = (given - expected.double()).abs()
    allowed = atol + rtol * expected.double().abs()
    passed = bool((gap <= allowed).all()) and bool(torch.isfinite(given).all())
    return Difference(key, float(gap.max()) if gap.numel() else 0.0, passed)
