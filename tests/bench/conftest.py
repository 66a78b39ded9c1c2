"""Prints what the benchmark table has no column for: stages, sizes, shares."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    session = getattr(config, "_benchmarksession", None)
    measured = [b for b in session.benchmarks if b.extra_info] if session else []
    if measured:
        terminalreporter.section("also measured")
    for benchmark in measured:
        figures = "  ".join(f"{k} {v}" for k, v in benchmark.extra_info.items())
        terminalreporter.write_line(f"{benchmark.name:28} {figures}")
