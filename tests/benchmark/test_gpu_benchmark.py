"""`echo-ray bench gpu`: its dry run on a CPU, its gate, its time, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from echo_ray.benchmark import report, run, stage_gate, timing
from echo_ray.benchmark.goals import GOALS
from echo_ray.benchmark.plan import DRY, STAGES, Budget, check_minutes, chosen
from echo_ray.benchmark.result import DRY_RUN, NOT_MEASURED, Check, Outcome, Table, shown
from echo_ray.benchmark.rungs import ALWAYS_ON
from echo_ray.benchmark.stage_ladder import _noise
from echo_ray.benchmark.stage_streams import Stream, play, table_row
from echo_ray.benchmark.timing import Spread
from echo_ray.benchmark.work import key_counts, work_of
from echo_ray.cli import main
from echo_ray.engine.generator import Generator
from echo_ray.errors import ConfigError, InvalidRequestError
from echo_ray.preset import Preset, load_preset
from echo_ray.session.engine_port import stream_shape

pytestmark = pytest.mark.timeout(300)
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="refuses only without CUDA")
QUICK = replace(DRY, gate_chunks=5, repeats=1, chunks=1, stream_seconds=0.9, streams=(1,))


class FakeClock:
    """Time that passes when somebody waits or works."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def wall(self) -> float:
        return 1_790_000_000.0 + self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def tiny() -> Preset:
    """echo-tiny with fewer layers and steps."""
    preset = load_preset("echo-tiny")
    return replace(
        preset, dit=replace(preset.dit, num_layers=2),
        sampler=replace(preset.sampler, steps=(1000, 500)),
    )  # fmt: skip


def request(stages: str = "all", minutes: float = 30.0, **changed: Any) -> run.Request:
    given: dict[str, Any] = {
        "command": "echo-ray bench gpu", "preset": tiny(), "device": "cpu", "minutes": minutes,
        "seed": 0, "stages": chosen(stages), "plan": QUICK,
    }  # fmt: skip
    return run.Request(**(given | changed))


@pytest.fixture(scope="module")
def dry() -> report.Run:
    """Every stage once, at a size that a CPU does in seconds."""
    from echo_ray.clock import SystemClock

    return run.benchmark(request(), SystemClock(), bar=False)


def test_a_dry_run_does_every_stage(dry: report.Run) -> None:
    assert [o.stage for o in dry.outcomes] == list(STAGES)
    assert [(o.stage, o.reason) for o in dry.outcomes if o.status != "done"] == []
    assert not dry.red
    samples = {name for o in dry.outcomes for name in o.samples}
    assert {
        "slots that stay, attention plain",
        "decoder wan, channels last",
        "whole chunk, group, decoded in a lane of its own",
        "chunk beside a copy",
        "resume",
        "first frame",
    } <= samples
    assert sum(len(o.checks) for o in dry.outcomes) >= 7


def test_every_output_of_a_dry_run_says_what_it_is(dry: report.Run, tmp_path: Path) -> None:
    terminal = list(report.lines(dry))
    assert terminal[0] == terminal[-1] == DRY_RUN
    data, page = report.write(dry, tmp_path)
    whole = json.loads(data.read_text())
    assert whole["dry_run"] == DRY_RUN
    assert whole["format"] == "echo-bench/1"
    assert all(o["samples"] for o in whole["stages"] if o["stage"] in ("ladder", "streams"))
    assert f"**{DRY_RUN}**" in page.read_text()
    assert page.name.startswith("dry-run_")
    # Nothing that a CPU did is held against a goal.
    goals = next(t for t in page.read_text().split("\n## ") if t.startswith("Goals"))
    assert goals.count(NOT_MEASURED) == 3 * len(GOALS)
    assert f"{len(GOALS)} {NOT_MEASURED}" in terminal[-2]


def test_the_ladder_has_the_baseline_below_it(dry: report.Run) -> None:
    ladder = next(o for o in dry.outcomes if o.stage == "ladder")
    rows = ladder.tables[0].rows
    assert rows[0]["rung"] == "R0, the published loop"
    assert [row["rung"] for row in rows[1:]] == [
        "slots that stay, attention plain", "graphs, their discipline checked", "fp8",
        "fp8+attention8",
    ]  # fmt: skip
    assert any("kernels: needs CUDA" in reason for reason in ladder.skipped)
    assert any("beside the first forward: needs CUDA" in reason for reason in ladder.skipped)
    fixed = next(t for t in ladder.tables if t.title == "Always on")
    assert [row["what"] for row in fixed.rows] == list(ALWAYS_ON)
    beside = ladder.samples["baseline beside slots that stay, attention plain"]
    assert len(beside) == QUICK.blocks * QUICK.chunks


def test_behind_a_red_gate_no_speed_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Generator.denoise
    monkeypatch.setattr(Generator, "denoise", lambda *a: whole(*a) * 1.01)
    out = tmp_path / "out"
    words = ["bench", "gpu", "--device", "cpu", "--preset", "echo-tiny", "--out", str(out)]
    monkeypatch.setattr("echo_ray.benchmark.run.DRY", replace(QUICK, gate_chunks=1))
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "FAIL  gate, slots that stay" in said
    assert "latents" in said
    assert report.RED in said
    for text in (said, *(f.read_text() for f in out.iterdir())):
        assert " ms" not in text
        assert "TFLOP" not in text
    stages = {s["stage"]: s for s in json.loads((out / "bench.json").read_text())["stages"]}
    assert stages["ladder"]["reason"] == "the gate is red"
    assert "samples" not in stages["gate"]


def test_a_red_check_of_a_later_stage_hides_every_speed(dry: report.Run) -> None:
    bad = Outcome("state", checks=[Check("resume", False, "chunk 3 differs")])
    broken = replace(dry, outcomes=[*dry.outcomes, bad])
    assert broken.red
    assert not any("TFLOP" in line for line in report.lines(broken))
    assert report.as_json(broken)["figures"] == {}
    assert "Ladder" not in report.as_page(broken)


def test_a_stage_that_fails_is_red_and_the_others_go_on() -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("no such kernel")

    runners = dict.fromkeys(STAGES, lambda *_: None) | {"micro": breaks}
    done = run.benchmark(request(), FakeClock(), runners, bar=False)
    assert {o.stage: o.status for o in done.outcomes}["micro"] == "failed"
    assert [o.status for o in done.outcomes if o.stage != "micro"] == ["done"] * 7
    assert done.red
    assert any("no such kernel" in line for line in report.lines(done))


def test_a_stage_without_time_or_memory_says_that_it_is_skipped() -> None:
    clock = FakeClock()

    def slow(*_: object) -> None:
        clock.sleep(100)

    def large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    runners = dict.fromkeys(STAGES, lambda *_: None) | {"gate": slow, "profile": large}
    done = run.benchmark(request("gate,micro,profile", minutes=2.5), clock, runners, bar=False)
    micro, profile = (next(o for o in done.outcomes if o.stage == n) for n in ("micro", "profile"))
    assert (micro.status, profile.status) == ("done", "skipped")
    assert "out of memory" in profile.reason
    done = run.benchmark(request("gate,micro", minutes=0.5), clock, runners, bar=False)
    micro = done.outcomes[-1]
    assert micro.status == "skipped"
    assert "give more --minutes or fewer --stages" in micro.reason
    assert any("stage micro skipped" in line for line in report.lines(done))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        pytest.param([], "device_missing", "--device cpu --preset echo-tiny", marks=NO_CUDA),
        (["--device", "cpu", "--stages", "ladder,speed"], "invalid_request", "'speed' is not a"),
        (["--device", "cpu", "--minutes", "0"], "config_invalid", "--minutes 0: give 0.1 to 120"),
        (["--device", "cpu", "--minutes", "nan"], "config_invalid", "--minutes nan"),
        (["--device", "cpu", "--preset", "echo-huge"], "model_unknown", "echo-huge"),
        (["--device", "cpu", "--seed", "-1"], "invalid_request", "-1"),
        (["--device", "cpu", "--preset", "echo-infinity-1.3b-short"], "config_invalid", "absolute"),
        (["--device", "cpu"], "config_invalid", "too large for a dry run"),
    ],
)  # fmt: skip
def test_what_is_refused(
    words: list[str], code: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "gpu", "--out", str(tmp_path), *words]) == 2
    err = capsys.readouterr().err
    assert f"echo-ray: {code}: " in err
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_is_refused(
    dry: report.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    words = ["--device", "cpu", "--preset", "echo-tiny", "--out", str(file)]
    assert main(["bench", "gpu", *words]) == 2
    assert f"--out {file}: cannot be written" in capsys.readouterr().err
    with pytest.raises(InvalidRequestError, match="cannot be written"):
        report.write(dry, tmp_path / "gone")


# ---- streams ------------------------------------------------------------------------------------


class FakeStep:
    """A chunk of so many slices, each of which takes its time."""

    def __init__(self, clock: FakeClock, slices: int, slice_s: float) -> None:
        self.clock, self.left, self.slice_s = clock, slices, slice_s

    def advance(self) -> Any:
        self.clock.sleep(self.slice_s)
        self.left -= 1
        return None if self.left else object()


def served(count: int, chunk_s: float, seconds: float = 60.0) -> list[Stream]:
    clock = FakeClock()
    shape = stream_shape(load_preset("echo-infinity-1.3b"))
    joins = [clock.now_s + (seconds / 2 if n and n == count - 1 else 0) for n in range(count)]
    streams = [
        Stream(f"s{n}", lambda: FakeStep(clock, 6, chunk_s / 6), at) for n, at in enumerate(joins)
    ]
    play(streams, shape, seconds, clock, clock.sleep)
    return streams


@pytest.mark.parametrize(("count", "chunk_s", "late"), [(2, 0.303, False), (3, 0.303, True),
                                                        (3, 0.223, False)])  # fmt: skip
def test_streams_miss_deadlines_exactly_where_they_do_not_fit(
    count: int, chunk_s: float, late: bool
) -> None:
    """Chunks of 0.75 s of video: two of 303 ms fit into them, three do not, three of 223 ms do."""
    row = table_row(served(count, chunk_s))
    assert row["streams"] == count
    missed = row["missed"]
    assert isinstance(missed, int)
    assert (missed > 3) == late
    if not late:
        assert missed == 0


def test_a_late_joiner_does_not_wait_for_whole_chunks_of_others() -> None:
    first = served(2, 0.6)[-1].first_frame_s
    # Its own six slices, and at most one of the other's before each.
    assert first is not None
    assert first <= 0.6 + 0.6 + 1e-6


# ---- what only CUDA does, with CUDA played ------------------------------------------------------


def test_a_gpu_is_timed_by_its_events_and_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Event:
        def __init__(self) -> None:
            self.number = 0

        def record(self) -> None:
            self.number = len(told)
            told.append("event")

        def elapsed_time(self, end: Event) -> float:
            assert told[-1] == "wait"
            return float(end.number - self.number)

    monkeypatch.setattr(timing, "_event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: told.append("wait"))
    timer = timing.Timer(torch.device("cuda"))
    assert timer.samples(lambda: told.append("work"), 2) == [2.0, 2.0]
    assert told == ["event", "work", "event"] * 2 + ["wait"]


def test_clocks_and_power_are_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="H", multi_processor_count=132, total_memory=80 * 2**30, major=9, minor=0, uuid="u-1"
    )
    asked: list[list[str]] = []

    def smi(words: list[str], **_: object) -> Any:
        asked.append(words)
        return SimpleNamespace(stdout="H, 580.1, 1755 MHz, 2619 MHz, 1980 MHz, 612 W, 700 W, 61\n")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(stage_gate.shutil, "which", lambda _: "/smi")
    monkeypatch.setattr(stage_gate.subprocess, "run", smi)
    facts = stage_gate.device_facts(torch.device("cuda"))
    assert (facts["clocks.sm"], facts["power.draw"]) == ("1755 MHz", "612 W")
    assert facts["memory"] == "80.0 GiB"
    assert asked[0][:2] == ["/smi", "--id=GPU-u-1"]
    # Nothing but questions: no setting of the device is touched.
    assert all(word.startswith(("--id=", "--query-gpu=", "--format=")) for word in asked[0][1:])
    monkeypatch.setattr(stage_gate.shutil, "which", lambda _: None)
    facts = stage_gate.device_facts(torch.device("cuda"))
    assert facts["clocks and power"] == "nvidia-smi is not there"


# ---- small pieces -------------------------------------------------------------------------------


def test_the_arithmetic_of_the_published_model() -> None:
    preset = load_preset("echo-infinity-1.3b")
    frame = preset.dit.tokens_per_frame
    assert key_counts(preset) == [n * frame for n in (3, 6, 9, 12, 15)]
    assert work_of(preset).flops / 1e12 == pytest.approx(162.5, abs=0.1)


def test_noise_is_what_the_baseline_differs_from_itself() -> None:
    assert _noise([[[10.0, 10.0], [10.0, 11.0]], [[10.0], [10.2]]]) == pytest.approx(0.05)
    assert _noise([]) == 0.0


def test_budget_leaves_what_a_stage_does_not_use_to_the_next() -> None:
    clock = FakeClock()
    budget = Budget(10, STAGES, clock)
    assert budget.total_s() == pytest.approx(600)
    clock.sleep(5)
    assert budget.left_s("machine") == pytest.approx(15)
    assert budget.left_s("gate") == pytest.approx(135)
    assert budget.refusal("machine", 15) == ""
    assert "takes about 16 s, 15 s of" in budget.refusal("machine", 16)


def test_stages_are_named_in_their_order_and_the_gate_is_always_there() -> None:
    assert chosen("all") == STAGES
    assert chosen("streams, ladder") == ("gate", "ladder", "streams")
    assert check_minutes(10) == 10
    with pytest.raises(ConfigError):
        check_minutes(121)


def test_tables_and_values() -> None:
    with pytest.raises(KeyError, match="no column 'speed'"):
        Table("t", ("ms",)).add(speed=1)
    assert [shown(v) for v in (None, 3, 0.00012, 12.345, 1234.5)] == [
        NOT_MEASURED, "3", "1.20e-04", "12.3", "1,234",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no sample"):
        Spread.of([])
    assert Spread.of([1.0, 2.0, 9.0]).median == 2.0
