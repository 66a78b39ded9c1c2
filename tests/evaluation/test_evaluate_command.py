"""`echo-ray evaluate`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from echo_ray import __version__
from echo_ray.cli import main
from echo_ray.evaluation import compare, drift
from echo_ray.preset import PRESETS


def test_it_measures_the_shipped_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["evaluate", "codec", "--cases", "2", "--seed", "7", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Codec round trip" in printed
    assert f"{out / 'codec.json'}  {out / 'codec.png'}" in printed
    body = json.loads((out / "codec.json").read_text())
    assert body["model"]["preset"] == "echo-tiny"
    assert body["versions"]["echo_ray"] == __version__
    assert body["command"].startswith("echo-ray evaluate codec --cases 2 --chunks 400 --seed 7")
    assert body["figures"]["true frames"]["colour"]["value"] == 1.0
    assert body["figures"]["PSNR, dB"]["of the mean error"] > 25
    assert len(body["cases"]) == 2


def test_it_compares_models_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "HIDDEN", (4,))
    monkeypatch.setattr(compare, "STREAM", 3)
    words = ["--model", "a=echo-tiny", "--model", f"b={PRESETS / 'echo-tiny'}"]
    assert main(["evaluate", "compare", *words, "--cases", "1", "--out", str(tmp_path)]) == 0
    assert "a, memory frozen at its start" in capsys.readouterr().out
    body = json.loads((tmp_path / "compare.json").read_text())
    assert body["command"].startswith("echo-ray evaluate compare --model a=echo-tiny --model b=")
    same = {f["b"]["hits"] == f["a"]["hits"] for n, f in body["figures"].items() if " " in n}
    assert same == {True}


def test_a_drift_run_that_is_stopped_leaves_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "SHOW_EVERY", 6)
    seen = drift.vote
    left = iter(range(9))

    def interrupted(*args: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return seen(*args)

    monkeypatch.setattr(drift, "vote", interrupted)
    command = ["evaluate", "drift", "--constant-streams", "2", "--switched-streams", "0"]
    assert main([*command, "--chunks", "12", "--out", str(tmp_path)]) == 130
    body = json.loads((tmp_path / "drift.json").read_text())
    assert [(case["kind"], case["chunks"]) for case in body["cases"]] == [(drift.CONSTANT, 3)] * 2
    assert "Unfinished: 6 of 24 chunks." in body["notes"]
    assert "--constant-streams 2 --switched-streams 0" in body["command"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["compare"], "no model is named"),
        (["compare", "--model", "a=/nowhere"], "/nowhere is no weights folder"),
        (["compare", "--model", "a=echo-tiny", "--cases", "0"], "--cases 0: give 1"),
        (["compare", "--model", "a=echo-tiny", "--out", "FILE"], "cannot be written"),
        (["recall", "--model", "a=echo-tiny"], "only for evaluate compare; for recall name"),
        (["comparre"], "did you mean compare?"),
        (["recal"], "evaluate 'recal' is unknown (did you mean recall?)"),
        (["recall", "--cases", "0"], "--cases 0: give 1 to 1000000"),
        (["drift", "--chunks", "0"], "--chunks 0: give 1"),
        (["drift", "--constant-streams", "-1"], "--constant-streams -1: give 0"),
        (["drift", "--switched-streams", "-1"], "--switched-streams -1: give 0"),
        (["recall", "--seed", "-1"], "--seed -1: give 0"),
        (["recall", "--set", "model.preset=echo-infinity-1.3b"], "there is no detector for"),
        (["all", "--set", "model.preset=echo-infinity-1.3b"], "there is no detector for"),
        (["speed", "--set", "model.preset=nothing"], "model 'nothing' is unknown"),
        (["recall", "--set", "model.weights=/nowhere"], "/nowhere"),
        (["recall", "--set", "model.presets=x"], "did you mean preset?"),
        (["recall", "--out", "FILE"], "cannot be written"),
        (["recall", "--out", "FILE/inside"], "cannot be written"),
    ],
)
def test_it_refuses(
    words: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    assert main(["evaluate", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert reason in err
