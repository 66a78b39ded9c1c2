"""The chaos run itself: what it counts, what it refuses, that it ends clean, and one short run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from chaos.cage import find_cage
from chaos.cluster import open_ports
from chaos.faults import CABLES, SHARES, Fault, draw
from chaos.report import UNDISTURBED, Findings, Window, examine, losses, rows, stalls, waits
from chaos.viewers import Show, Viewing
from fakes import FakeEngine

TESTS = Path(__file__).parents[1]
PROMPT = "a red ball"


def seen(digests: list[str], arrivals: list[float] | None = None) -> Viewing:
    times = arrivals or [n / 4 for n in range(len(digests))]
    return Viewing("v", list(range(len(digests))), list(digests), times)


def show(chunks: int) -> Show:
    made = Show("s", PROMPT, 7, last=chunks - 1)
    made.viewings.append(Viewing("v", indices=list(range(chunks))))
    made.viewings = [seen(made.truth(FakeEngine()))]
    return made


def window(at: float, kind: str = "replica killed") -> Window:
    return Window(Fault(kind, "", at))


def test_a_lost_a_repeated_and_a_differing_segment_are_counted() -> None:
    truth = ["a", "b", "c", "d"]
    assert not losses(seen(truth), truth, 3).any
    assert losses(seen(truth[:3]), truth, 3).lost == 1
    twice = Viewing("v", [0, 1, 1, 2, 3], ["a", "b", "b", "c", "d"])
    assert losses(twice, truth, 3).duplicated == 1
    assert losses(Viewing("v", [0, 2, 1, 3], ["a", "c", "b", "d"]), truth, 3).duplicated == 1
    assert losses(seen(["a", "b", "x", "d"]), truth, 3).differing == 1


def test_a_run_fails_for_one_wrong_segment_and_for_nothing_less() -> None:
    engine = FakeEngine()

    def found(one: Show) -> Findings:
        findings = Findings(1, "fake", 1.0, windows=[window(0.0, UNDISTURBED)])
        examine(findings, [one], engine.shape, engine)
        return findings

    assert not found(show(12)).failed
    wrong = show(12)
    wrong.viewings[0].digests[5] = "0"
    assert found(wrong).failed
    short = show(12)
    short.last = 12
    assert found(short).failed
    marked = show(12)
    marked.viewings[0].marked.append(3)
    assert found(marked).failed
    unswitched = show(12)
    unswitched.switches[4] = ["a green square"]
    assert found(unswitched).losses.differing == 8
    assert Findings(1, "fake", 1.0).failed


def test_a_wait_counts_from_the_fault_and_for_the_fault_that_made_it() -> None:
    windows = [window(1.0), window(3.0), window(5.0)]
    viewing = seen(["-"] * 6, [0.9, 1.4, 2.9, 3.5, 4.2, 5.5])
    blamed = [(windows.index(w), round(s, 6)) for w, s in waits(windows, viewing)]
    # The last segment had been due for 0.8 s when the third fault came: the second one's doing.
    assert blamed == [(0, 0.4), (0, 1.5), (1, 0.5), (1, 0.7), (1, 1.3)]


def test_a_stall_is_what_a_buffer_of_two_seconds_does_not_bear() -> None:
    shape = FakeEngine().shape
    steady = [shape.start_s(n) for n in range(40)]
    assert sum(stalls(seen(["-"] * 40, steady), shape)) == 0
    late = [at + (3.0 if n >= 20 else 0.0) for n, at in enumerate(steady)]
    stood = stalls(seen(["-"] * 40, late), shape)
    assert [n for n, s in enumerate(stood) if s] == [20]
    assert stood[20] == pytest.approx(1.0)


def test_the_table_says_how_many_faults_met_their_goal() -> None:
    findings = Findings(1, "fake", 60.0, windows=[window(0.0), window(9.0)])
    findings.windows[0].wait_s, findings.windows[1].wait_s = 0.4, 1.2
    (row,) = rows(findings)[1:]
    assert row[:2] == ["replica killed", "2"]
    assert row[3:7] == ["0.80", "1.20", "1.20", "1 s: 1 of 2"]


def test_faults_are_drawn_from_the_seed_in_their_shares() -> None:
    kinds = draw(random.Random(3), 50, cables=True)
    assert kinds == draw(random.Random(3), 50, cables=True)
    assert kinds != draw(random.Random(4), 50, cables=True)
    assert {kind: kinds.count(kind) for kind in SHARES} == SHARES
    assert not set(CABLES) & set(draw(random.Random(3), 120, cables=False))


def test_open_ports_of_a_process_are_found_without_asking_its_namespace() -> None:
    code = (
        "import socket, sys; s = socket.create_server(('0.0.0.0', 0)); "
        "print(s.getsockname()[1], flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        assert open_ports(child.pid) == [port]
        child.kill()
    assert open_ports(child.pid) == []


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "chaos", *map(str, arguments)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TESTS)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--faults", "0"], "--faults: 0 is not allowed: 1 to 10000"),
        (["--faults", "many"], "invalid int value: 'many'"),
        (["--engine", "other"], "invalid choice: 'other'"),
        (["--seed", "x"], "invalid int value: 'x'"),
        (["--ouch"], "unrecognized arguments: --ouch"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(arguments: list[str], said: str) -> None:
    ran = subprocess.run(
        command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=55
    )
    assert ran.returncode == 2
    assert said in ran.stderr


def ours(mark: str) -> Iterator[psutil.Process]:
    """Live processes that name this run's folder, or were told it."""
    for process in psutil.process_iter():
        try:
            words = " ".join([*process.cmdline(), *process.environ().values()])
        except psutil.Error:
            continue
        if mark in words and process.pid != os.getpid():
            yield process


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process(tmp_path: Path, how: signal.Signals) -> None:
    if how is signal.SIGKILL and find_cage().refusal:
        pytest.skip("no namespaces here, so nobody is left to clean up")
    # A short path, for the sockets in it; tmp_path would be too long.
    with tempfile.TemporaryDirectory(prefix="c") as mark:
        _interrupt(how, mark, tmp_path)


def _interrupt(how: signal.Signals, mark: str, out: Path) -> None:
    run = subprocess.Popen(
        command("--seed", 1, "--faults", 3, "--out", out),
        env={**ENVIRONMENT, "TMPDIR": mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        limit = time.monotonic() + 120
        while sum("raylet" in p.name() for p in ours(mark)) < 1:
            assert time.monotonic() < limit, "no raylet started"
            time.sleep(0.2)
        run.send_signal(how)
        assert run.wait(60) == (-how if how is signal.SIGKILL else 130)
        limit = time.monotonic() + 60
        while list(ours(mark)) and time.monotonic() < limit:
            time.sleep(0.1)
    finally:
        run.kill()
        run.wait(10)
    assert list(ours(mark)) == []


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(500)
def test_a_few_faults_lose_nothing(tmp_path: Path) -> None:
    ran = subprocess.run(
        command("--seed", 12, "--faults", 3, "--out", tmp_path),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "segments lost / duplicated / differing: 0 / 0 / 0" in ran.stdout
    findings = json.loads((tmp_path / "chaos.json").read_text())
    assert len(findings["windows"]) == 4
    assert findings["segments"] > 100
    assert "| undisturbed | 1 |" in (tmp_path / "chaos.md").read_text()
