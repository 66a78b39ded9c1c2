"""Every kernel compiles for the device that it is meant for, and fuses no rounding away."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import echo_kernels
from echo_kernels.launch import Kernel

PROGRAM = Path(__file__).parents[1] / "kernel_compile.py"


def launched_kernels() -> set[str]:
    """All that is marked as a kernel, but for the functions that only kernels call."""
    modules = [
        importlib.import_module(f"echo_kernels.{m.name}")
        for m in pkgutil.iter_modules(echo_kernels.__path__)
        if m.name != "device"
    ]
    found = {v for m in modules for v in vars(m).values() if isinstance(v, Kernel)}
    return {k.function.__name__ for k in found if k.function.__module__ != "echo_kernels.device"}


def test_every_kernel_compiles_for_an_h100(triton: None, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _, _ in lines} == launched_kernels()
    assert len(lines) == 21
    for name, size, fused in lines:
        assert int(size) > 1000, name
        assert int(fused) == 0, f"{name} rounds once where its truth rounds twice"
