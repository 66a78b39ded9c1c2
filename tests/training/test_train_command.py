"""`echo-ray train`: the whole recipe from nothing to weights that serve, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from echo_ray.cli import main
from echo_ray.config import ModelSection
from echo_ray.engine.build import build_engine
from echo_ray.errors import WeightsError
from echo_ray.preset import load_preset
from echo_ray.training.export import preset_text
from echo_ray.training.pictures import curve_picture
from echo_ray.training.recipe import STAGES
from echo_ray.training.recipe_file import find_recipes, read_recipe
from echo_ray.training.train import preset_of
from echo_ray.weights.folder import WeightsFolder

REFUSED = 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_smoke_recipe_runs_every_stage_and_leaves_a_stream(tmp_path: Path) -> None:
    words = ["train", "--config", "smoke", "--out", str(tmp_path)]
    assert main(words) == 0
    for stage in STAGES:
        folder = tmp_path / stage
        assert (folder / "weights.safetensors").is_file()
        assert json.loads((folder / "recipe.json").read_text())["stage"] == stage
        assert (folder / "curves.png").is_file()
    checkpoint = (tmp_path / "streaming" / "checkpoint.pt").stat().st_mtime_ns
    engine = build_engine(ModelSection(weights=str(tmp_path / "streaming")))
    assert engine.step(engine.open("a red ball", 1)).frames
    assert main([*words[:2], "smoke/streaming", *words[3:], "--resume"]) == 0
    assert (tmp_path / "streaming" / "checkpoint.pt").stat().st_mtime_ns > checkpoint
    progress = json.loads((tmp_path / "streaming" / "curves.json").read_text())
    assert progress["loss"]["step"][-1] <= 4


def test_what_cannot_be_trained_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        assert main(["train", "--out", str(tmp_path), "--config", *words]) == REFUSED
        return capsys.readouterr().err

    assert "'nonsense' is neither a TOML file" in refused("nonsense")
    assert "two recipes of the stage fewstep would share the folder" in refused("dmd", "dmd")
    shared = refused("ablations", "--set", "run.folder=same")
    assert f"{tmp_path / 'same'}; give each a run.folder" in shared
    assert "run.minutes: -1.0 is not allowed" in refused("codec", "--minutes", "-1")
    assert "run.stebs: unknown" in refused("codec", "--set", "run.stebs=3")
    assert "manifest.json" in refused("pretrain")
    assert "model 'nonsense' is unknown" in refused("codec", "--set", "preset=nonsense")
    umt5 = refused("codec", "--set", "preset=echo-infinity-1.3b")
    assert "a codec of kind 'wan' is not trained here" in umt5
    assert not (tmp_path / "pretrain").exists()


def test_ablations_share_one_bank_and_are_served_by_their_folders(tmp_path: Path) -> None:
    changes = ["run.steps=1", "run.sheet_chunks=0", "clips.count=2", "clips.chunks=6"]
    words = [w for change in (*changes, "pretrain.batch=1") for w in ("--set", change)]
    names = [f"ablations/{name}" for name in ("absolute", "memory_5", "no_gate")]
    assert main(["train", "--config", *names, "--out", str(tmp_path), *words]) == 0
    assert len(list(tmp_path.glob("bank-*"))) == 1
    gates = {}
    for recipe in (read_recipe(file) for name in names for file in find_recipes(name)):
        folder = tmp_path / str(recipe.run.folder)
        assert load_preset(str(folder)) == preset_of(recipe)
        engine = build_engine(ModelSection(preset=str(folder)))
        assert engine.step(engine.open("a red ball", 1)).frames
        gates[folder.name] = "gate_linear.bias" in WeightsFolder.open(folder).keys("memory")
    assert [name for name, gate in gates.items() if not gate] == ["no_gate"]
    with pytest.raises(WeightsError, match=r"cache\.memory\.gate is False here, True there"):
        build_engine(ModelSection(weights=str(tmp_path / "no_gate")))


@pytest.mark.parametrize("name", ["echo-tiny", "echo-infinity-1.3b", "echo-infinity-1.3b-short"])
def test_a_preset_that_is_written_is_read_as_the_same(name: str, tmp_path: Path) -> None:
    preset = load_preset(name)
    (tmp_path / "preset.toml").write_text(preset_text(preset), encoding="utf-8")
    assert load_preset(str(tmp_path)) == preset
    without = replace(preset, cache=replace(preset.cache, memory=None), small_codec=None)
    (tmp_path / "preset.toml").write_text(preset_text(without), encoding="utf-8")
    assert load_preset(str(tmp_path)) == without


def test_curves_are_drawn(tmp_path: Path) -> None:
    points = [(n, 2.0 / n) for n in range(1, 40)]
    curve_picture({"student": points, "critic": points, "short": [(1, 1.0)]}, tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as image:
        assert image.size == (720, 440)
        assert len(image.getcolors(10_000)) > 4
    curve_picture({}, tmp_path / "none.png")
    assert (tmp_path / "none.png").is_file()
