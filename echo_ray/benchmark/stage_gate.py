"""Stages that come before any speed: what the machine is, and whether the engine is right."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata

import torch

from echo_ray import __version__
from echo_ray.benchmark import gate
from echo_ray.benchmark.random_weights import check_residuals
from echo_ray.benchmark.result import Check, Outcome
from echo_ray.benchmark.rungs import attention, best_exact, climbed, ladder, published
from echo_ray.benchmark.subject import Bench

_QUERY = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
)
_FORMAT = "--format=csv,noheader"
_SMI_TIMEOUT_S = 20
_LIBRARIES = ("torch", "triton", "numpy", "flash-attn", "flash-attn-3", "fa3-fwd")


def machine(bench: Bench, out: Outcome) -> None:
    """Device, clocks, power and versions; nothing is changed, only read."""
    facts = out.table("Machine", "what", "value")
    for what, value in (device_facts(bench.device) | versions()).items():
        facts.add(what=what, value=value)


def device_facts(device: torch.device) -> dict[str, str]:
    """What the device says of itself, its clocks and power at this moment among it."""
    if device.type != "cuda":
        return {"device": f"CPU, {platform.machine()}", "threads": str(torch.get_num_threads())}
    properties = torch.cuda.get_device_properties(device)
    facts = {
        "device": properties.name,
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "capability": f"{properties.major}.{properties.minor}",
    }
    program = shutil.which("nvidia-smi")
    if program is None:
        return facts | {"clocks and power": "nvidia-smi is not there"}
    try:
        done = subprocess.run(
            [program, f"--id=GPU-{properties.uuid}", f"--query-gpu={_QUERY}", _FORMAT],
            capture_output=True, text=True, check=True, timeout=_SMI_TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as e:
        return facts | {"clocks and power": f"nvidia-smi failed: {type(e).__name__}"}
    values = (value.strip() for value in done.stdout.splitlines()[0].split(","))
    return facts | dict(zip(_QUERY.split(","), values, strict=False))


def versions() -> dict[str, str]:
    found = {"echo-ray": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found["CUDA"] = torch.version.cuda or "none"
    found["cuDNN"] = str(torch.backends.cudnn.version() or "none")  # type: ignore[no-untyped-call]
    found["ECHO_KERNELS"] = os.environ.get("ECHO_KERNELS", "")
    return found


def parity(bench: Bench, out: Outcome) -> None:
    """Every rung that is to be timed against the baseline, from scratch through all phases."""
    loop = bench.baseline(attention(bench, published(bench)))
    loop.residuals = []
    loop.generate(loop.start(bench.prompts()[0]), bench.noise())
    low, high = check_residuals(loop.residuals)
    loop.residuals = None
    out.checks.append(Check("residual stream", True, f"RMS {low:.2f} to {high:.2f}"))
    table = out.table("Gate", "rung", "what", "worst", "allowed", "verdict")
    rungs = [rung for rung in ladder(bench) if not rung.missing]
    out.skipped += [f"{rung.name}: {rung.missing}" for rung in ladder(bench) if rung.missing]
    best = best_exact(bench)
    for rung in rungs:
        bench.say(f"gate: {rung.name}")
        with climbed(bench, rung) as ours:
            # The prompt switch, once: with every exact switch on.
            prompts = bench.prompts()[: 2 if rung == best else 1]
            share = None if rung.exact else gate.SHARE_8
            results = list(
                gate.compare(ours, loop, prompts, bench.noise(), bench.plan.gate_chunks, share)
            )
        for worst in _worst(results):
            verdict = "pass" if worst.passed else "FAIL"
            table.add(
                rung=rung.name, what=worst.what, worst=worst.found, allowed=worst.allowed,
                verdict=verdict,
            )  # fmt: skip
        bad = gate.failed(results)
        detail = "; ".join(r.line() for r in bad[:3]) or f"{len(results)} numbers compared"
        out.checks.append(Check(f"gate, {rung.name}", not bad, detail))


def _worst(results: list[gate.Compared]) -> list[gate.Compared]:
    by_name: dict[str, gate.Compared] = {}
    for result in results:
        known = by_name.get(result.what)
        if known is None or result.found > known.found:
            by_name[result.what] = result
    return list(by_name.values())
