"""Stages of `echo-ray bench gpu` by themselves: what they cover, and what makes each red."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import echo_kernels
from echo_kernels.dispatch import Op
from echo_ray.benchmark import lane_rung, ops, rungs, stage_decoders, stage_micro, stage_state
from echo_ray.benchmark.plan import DRY, STAGES, Budget
from echo_ray.benchmark.random_weights import random_codec
from echo_ray.benchmark.result import Check, Outcome, Table
from echo_ray.benchmark.rungs import Rung, Setting, climbed, ladder
from echo_ray.benchmark.subject import Bench
from echo_ray.benchmark.timing import Timer
from echo_ray.clock import SystemClock
from echo_ray.engine.aside import HostAside
from echo_ray.engine.decoding import Decoders
from echo_ray.model.tiny_vae import TinyVae
from echo_ray.preset import load_preset
from echo_ray.session.snapshot import Buffer, Snapshot

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def bench() -> Bench:
    preset, cpu = load_preset("echo-tiny"), torch.device("cpu")
    preset = replace(preset, dit=replace(preset.dit, num_layers=2))
    plan = replace(DRY, repeats=1, chunks=1)
    budget = Budget(30, STAGES, SystemClock())
    return Bench(preset, cpu, 0, plan, budget, Timer(cpu), lambda _: None)


def checks(out: Outcome) -> dict[str, Check]:
    return {check.what: check for check in out.checks}


# ---- micro --------------------------------------------------------------------------------------


def test_every_op_is_timed(bench: Bench) -> None:
    known = (getattr(echo_kernels, name) for name in echo_kernels.__all__)
    assert set(ops.calls(bench, bench.dtype)) == {op.name for op in known if isinstance(op, Op)}
    assert {name for name in ops.calls(bench, bench.dtype) if "8" in name.replace("uint8", "")} == (
        ops.EIGHT_BITS
    )


def test_ops_are_given_what_they_take_and_are_near_their_exact_form(bench: Bench) -> None:
    out = Outcome("micro")
    for call in ops.calls(bench, torch.bfloat16).values():
        call.op.check(*call.args)
    stage_micro._kernels(bench, out)
    for row in out.tables[0].rows:
        assert isinstance(row["plain error"], float)
        assert row["plain error"] < 0.01, row


def test_bytes_are_those_of_arguments_and_results() -> None:
    rows = echo_kernels.Rows8(torch.zeros(2, 8, dtype=torch.float8_e4m3fn), torch.ones(2, 1))
    call = ops.Call(None, (torch.zeros(2, 8), rows, 0.1))
    assert call.size_bytes((torch.zeros(4), rows)) == 64 + 2 * (16 + 8) + 16
    assert call.result((torch.zeros(4), rows)).shape == (2, 8)
    written = torch.ones(3)
    assert ops.Call(None, (), written).result(None) is written


# ---- ladder -------------------------------------------------------------------------------------


def test_the_ladder_of_a_gpu_has_every_switch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rungs, "refusal", lambda *_: "")
    gpu: Any = SimpleNamespace(dry=False)
    climbed_up = ladder(gpu)
    assert [rung.name for rung in climbed_up] == [
        "slots that stay, attention flash", "attention fa2", "attention cudnn", "attention fa3",
        "kernels", "graphs", "memory updated beside the first forward", "fp8", "fp8+attention8",
    ]  # fmt: skip
    for below, rung in pairwise(climbed_up):
        pair = (below.setting, rung.setting)
        changed = [f.name for f in fields(Setting) if len({getattr(s, f.name) for s in pair}) > 1]
        # The tier of 8-bit attention brings its own.
        assert changed in (["attention"], ["kernels"], ["graphs"], ["beside"], ["precision"],
                           ["attention", "precision"])  # fmt: skip
    assert rungs.best_exact(gpu).name == "memory updated beside the first forward"
    assert rungs.best_seen(gpu) == rungs.best_exact(gpu)


def test_a_rung_updates_the_memory_where_it_says(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Played(HostAside):
        pass

    monkeypatch.setattr(rungs, "aside_of", lambda _: Played())
    for beside in (True, False):
        rung = Rung("memory", Setting(attention="plain", beside=beside))
        with climbed(bench, rung) as generator:
            assert isinstance(generator._aside, Played) == beside


@pytest.mark.parametrize("same", [True, False])
def test_a_lane_that_changes_frames_is_red(
    bench: Bench, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def played(_bench: Any, _generator: Any, _decoders: Any, beside: bool) -> lane_rung.Whole:
        return lambda: torch.tensor([1 if beside and not same else 0])

    monkeypatch.setattr(lane_rung, "_chunks", played)
    out, nothing = Outcome("ladder"), SimpleNamespace()
    table = out.table("Whole chunks", "decoder", "decoded", "ms", "times the first")
    lane_rung._in_turns(bench, out, table, "tiny", nothing, nothing)  # type: ignore[arg-type]
    assert out.red != same
    assert set(out.figures) == {"whole_tiny_ms"}


# ---- decoders -----------------------------------------------------------------------------------


def decoded(bench: Bench) -> Outcome:
    out = Outcome("decoders")
    times = out.table(
        "Decoders", "decoder", "form", "ms a chunk", "p95 ms", "times the first", "state MB"
    )
    shape = stage_decoders.codecs(bench)["tiny"]
    codec = random_codec(shape, bench.preset.dit, bench.device, bench.dtype, 0)
    stage_decoders._ladder(bench, out, "tiny", codec, times)
    return out


def forms(table: Table) -> list[str]:
    return [str(row["form"]).partition(",")[0] for row in table.rows]


def test_decoders_are_timed_from_the_published_form_to_the_served_one(bench: Bench) -> None:
    out = decoded(bench)
    assert forms(out.tables[0]) == ["plain operations", "channels last", "recorded"]
    assert not out.red
    served = out.samples["decoder tiny, recorded, its discipline checked"]
    assert out.figures["decode_tiny_ms"] == pytest.approx(served[0])
    assert out.figures["decode_tiny_plain_ms"] == out.tables[0].rows[0]["ms a chunk"]


def test_a_form_that_decodes_otherwise_is_red_and_not_timed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(codec: TinyVae) -> None:
        for parameter in codec.parameters():
            parameter.mul_(1.1)

    monkeypatch.setattr(TinyVae, "lie_channels_last", spoiled)
    out = decoded(bench)
    assert not checks(out)["tiny decoder, channels last"].passed
    assert "channels last" not in forms(out.tables[0])


def test_the_engine_s_own_recording_is_what_is_compared(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Decoders._recorded
    monkeypatch.setattr(Decoders, "_recorded", lambda *a, **k: whole(*a, **k) * 0.999)
    out = decoded(bench)
    assert not checks(out)["tiny decoder, recorded, its discipline checked"].passed
    assert forms(out.tables[0])[-1] == "channels last"


# ---- state --------------------------------------------------------------------------------------


def test_admission_that_counts_too_little_is_red() -> None:
    out = Outcome("state")
    stage_state.admission(out, {"window": 3_000_000, "decoder": 1_000_000}, 4_000_001)
    assert out.red
    assert out.checks[0].detail == "4,000,000 bytes counted, 4,000,001 taken, -1"
    rows = {row["what"]: row["MB"] for row in out.tables[0].rows}
    assert rows["counted beyond what was taken"] == pytest.approx(-1e-6)
    out = Outcome("state")
    stage_state.admission(out, {"window": 4_000_001}, 4_000_001)
    assert not out.red


def test_what_a_session_takes_of_a_gpu_is_the_most_that_was_given_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = []
    gpu: Any = SimpleNamespace(
        dry=False, seed=0, device="cuda", timer=SimpleNamespace(settle=lambda: told.append("idle"))
    )
    engine: Any = SimpleNamespace(
        open=lambda *_: told.append("open"), step=lambda *_: told.append("step"),
        close=lambda *_: told.append("close"), state_bytes=lambda _: 1,
    )  # fmt: skip
    monkeypatch.setattr(stage_state, "free", lambda _: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: told.append("anew"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 175)
    assert stage_state._taken(gpu, engine) == 75
    assert told[:3] == ["idle", "anew", "open"]
    assert told[-3:] == ["step", "idle", "close"]


@pytest.mark.parametrize("steady", [True, False])
def test_a_copy_that_a_step_writes_into_is_red(bench: Bench, steady: bool) -> None:
    class Played:
        shape = SimpleNamespace(chunk_s=0.75)
        steps = 0

        def saving(self, _: object) -> Any:
            return lambda: Snapshot(
                "f", {}, {"a": Buffer("uint8", (1,), bytes([0 if steady else self.steps]))}
            )

        def step(self, _: object) -> Any:
            self.steps += 1
            return SimpleNamespace(digest="d")

    out, played = Outcome("state"), Played()
    _, digests = stage_state._saved(bench, out, played, None, 1.0)  # type: ignore[arg-type]
    assert digests == ["d"]
    assert out.red != steady
    assert "copy_share" in out.figures
