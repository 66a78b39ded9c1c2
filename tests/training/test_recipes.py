"""Recipes: every packaged one is read, and what cannot be is refused by name."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from echo_ray.errors import ConfigError, ModelUnknown
from echo_ray.preset import PRESETS, load_preset
from echo_ray.training.budget import Budget, learning_rate_factor
from echo_ray.training.recipe import (
    STAGES,
    DmdSection,
    FewstepRecipe,
    OptimizerSection,
    PretrainRecipe,
    PretrainSection,
    StreamingRecipe,
)
from echo_ray.training.recipe_file import CONFIGS, find_recipes, named_folder, read_recipe
from echo_ray.training.train import preset_of

PACKAGED = sorted(CONFIGS.rglob("*.toml"))


@pytest.mark.parametrize("file", PACKAGED, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_every_packaged_recipe_is_read(file: Path) -> None:
    recipe = read_recipe(file)
    assert recipe.stage in STAGES
    assert load_preset(recipe.preset).name == recipe.preset


def test_there_is_a_packaged_recipe_for_every_stage() -> None:
    assert {read_recipe(f).stage for f in CONFIGS.glob("*.toml")} == set(STAGES)
    smoke = [read_recipe(f).stage for f in find_recipes("smoke")]
    assert smoke == list(STAGES)


def test_the_published_settings_are_those_of_the_recipe_by_distribution_matching() -> None:
    recipe = read_recipe(find_recipes("dmd")[0])
    assert isinstance(recipe, FewstepRecipe)
    assert recipe.dmd is not None
    assert recipe.dmd.ratio == 5
    assert (recipe.dmd.low, recipe.dmd.high) == (0.02, 0.98)
    for optimizer in (recipe.optimizer, recipe.dmd.critic):
        assert optimizer.betas == (0.0, 0.999)
        assert (optimizer.weight_decay, optimizer.clip) == (0.01, 10.0)
    assert not recipe.optimizer.clip_memory
    assert recipe.ema.decay == 0.99


def test_values_are_changed_from_the_command_line() -> None:
    file = find_recipes("streaming")[0]
    recipe = read_recipe(file, ["run.steps=3", "streaming.bptt_clips=2", "lora.rank=8"])
    assert isinstance(recipe, StreamingRecipe)
    assert recipe.run.steps == 3
    assert recipe.streaming.bptt_clips == 2
    assert recipe.lora is not None
    assert (recipe.lora.rank, recipe.lora.scale) == (8, 1.0)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("run.step=3", r"run\.step: unknown \(did you mean steps\?\)"),
        ("rollout.objectiv=dmd", r"rollout\.objectiv: unknown"),
        ("rollout.objective=gan", r"rollout\.objective: 'gan' is not allowed"),
        ("rollout.objective=dmd", r"a section \[dmd\] if, and only if"),
        ("dmd.teacher=somewhere", r"a section \[dmd\] if, and only if"),
        ("optimizer.kind=sgd", r"optimizer\.kind: 'sgd'"),
        ("optimizer.schedule=linear", r"optimizer\.schedule: 'linear'"),
        ("optimizer.lr=0.0", r"optimizer\.lr: 0\.0"),
        ("run.steps=0", r"run\.steps: 0 is not allowed: at least 1"),
        ("run.minutes=-1", r"run\.minutes: -1"),
        ("run.device=tpu", r"run\.device: 'tpu'"),
        ("ema.decay=1.0", r"ema\.decay: 1\.0"),
        ("clips.count=0", r"clips\.count: 0"),
        ("clips.scene_chunks=9", r"clips\.scene_chunks: 9 is not allowed: at least 10"),
        ("clips.two_objects=-1.0", r"clips\.two_objects: -1\.0 is not allowed: from 0 to 1"),
        ("clips.hide_share=1.5", r"clips\.hide_share: 1\.5 is not allowed: from 0 to 1"),
        ("fresh=[codec]", r"fresh: \('codec',\)"),
        ("stage=deploy", r"stage: 'deploy' is not allowed: one of codec, teacher"),
        ("streaming.overlap_chunks=7", r"streaming\.overlap_chunks: 7.*less than"),
        ("streaming.bptt_clips=0", r"streaming\.bptt_clips: 0"),
        ("rollout.fast_forward=-1", r"rollout\.fast_forward: -1"),
        ("rollout.aligned_from=-1", r"rollout\.aligned_from: -1"),
        ("rollout.batch=0", r"rollout\.batch: 0"),
        ("run.folder=a/b", r"run\.folder: 'a/b' is not allowed: letters, digits and underscores"),
        ("run.folder=..", r"run\.folder: '\.\.'"),
        ("run.folder=''", r"run\.folder: ''"),
        ("cache=echo", r"cache: expected a mapping"),
        ("cache.polycy=absolute", r"cache\.polycy: unknown \(did you mean policy\?\)"),
        ("cache.memory.gate=3", r"cache\.memory\.gate: expected bool, got 3"),
        ("cache.memory.frames=0", r"cache\.memory\.frames: 0"),
        ("cache.window_frames=13", r"cache\.sink_frames: 3 .* a window of whole chunks"),
    ],
)
def test_what_cannot_be_is_refused_by_name(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_recipe(find_recipes("streaming")[0], [assignment])


def test_sections_refuse_impossible_numbers() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.betas"):
        OptimizerSection(betas=(0.9, 1.0))
    with pytest.raises(ConfigError, match=r"pretrain\.return_weight: 0\.0"):
        PretrainSection(return_weight=0.0)
    with pytest.raises(ConfigError, match=r"pretrain\.hide_sink: 2"):
        PretrainSection(hide_sink=2)
    with pytest.raises(ConfigError, match=r"dmd\.low"):
        DmdSection(teacher="x", low=0.99)
    with pytest.raises(ConfigError, match=r"dmd\.ratio"):
        DmdSection(teacher="x", ratio=0)


def test_recipes_are_found_by_path_name_or_folder(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('stage = "codec"\n[run]\nsteps = 2\n')
    assert find_recipes(str(own)) == [own]
    assert find_recipes(str(tmp_path)) == [own]
    assert find_recipes("smoke/pretrain") == [CONFIGS / "smoke" / "pretrain.toml"]
    with pytest.raises(ConfigError, match=r"nor one of ablations/absolute, .*no_gate, codec, dmd"):
        find_recipes("nonsense")
    own.write_text("stage = ")
    with pytest.raises(ConfigError, match="cannot be read as a recipe"):
        read_recipe(own)
    own.write_text("steps = 2\n")
    with pytest.raises(ConfigError, match="stage: None is not allowed"):
        read_recipe(own)


def test_folders_are_named_from_the_runs_own_and_the_presets() -> None:
    out = Path("runs/a")
    assert named_folder("{out}/codec", out, "echo-tiny") == Path("runs/a/codec")
    assert named_folder("elsewhere", out, "nothing") == Path("elsewhere")
    assert named_folder("{preset}", out, "echo-tiny") == PRESETS / "echo-tiny"
    with pytest.raises(ModelUnknown, match="model 'nothing' is unknown"):
        named_folder("{preset}", out, "nothing")


def test_a_recipe_changes_a_part_of_the_presets_cache(tmp_path: Path) -> None:
    file, preset = tmp_path / "own.toml", load_preset("echo-tiny")
    plain = 'stage = "pretrain"\ninit_from = "x"\n[run]\nsteps = 2\n'
    file.write_text(plain)
    recipe = read_recipe(file)
    assert isinstance(recipe, PretrainRecipe)
    assert recipe.cache is None
    assert preset_of(recipe) == preset
    file.write_text(plain + "[cache]\nposition_limit = 24\n[cache.memory]\nframes = 1\n")
    assert preset.cache.memory is not None
    memory = replace(preset.cache.memory, frames=1)
    changed = replace(preset.cache, position_limit=24, memory=memory)
    assert preset_of(read_recipe(file)) == replace(preset, cache=changed)
    without = preset_of(read_recipe(file, ["cache.memory=null"]))
    assert without.cache == replace(changed, memory=None)
    with pytest.raises(ConfigError, match="cache: unknown"):
        read_recipe(find_recipes("codec")[0], ["cache.policy=absolute"])


def test_ablations_differ_in_one_value_each_and_in_nothing_else() -> None:
    recipes = {file.stem: read_recipe(file) for file in find_recipes("ablations")}
    assert list(recipes) == ["absolute", "memory_1", "memory_3", "memory_5", "no_gate"]
    baseline = recipes["memory_3"]
    assert preset_of(baseline) == load_preset("echo-tiny")
    assert isinstance(baseline, PretrainRecipe)
    assert (baseline.init_from, baseline.fresh) == ("{preset}", ("memory",))
    differing = {}
    for name, recipe in recipes.items():
        assert isinstance(recipe, PretrainRecipe)
        assert recipe.run.folder == name
        run = replace(recipe.run, folder=baseline.run.folder)
        assert replace(recipe, run=run, cache=None) == baseline
        ours, theirs = (flat(asdict(preset_of(r).cache)) for r in (recipe, baseline))
        differing[name] = {key: ours[key] for key in ours if ours[key] != theirs[key]}
    assert differing == {
        "absolute": {"policy": "absolute"},
        "memory_1": {"memory.frames": 1},
        "memory_3": {},
        "memory_5": {"memory.frames": 5},
        "no_gate": {"memory.gate": False},
    }


def flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Values by their whole path."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{key}.") if isinstance(value, dict) else {path + key: value}
    return found


def test_learning_rate_rises_stays_and_falls() -> None:
    shares = [0.0, 0.01, 0.1, 0.5, 0.75, 1.0]
    factors = [learning_rate_factor(s) for s in shares]
    assert factors[0] < factors[1] < factors[2] == factors[3] == 1.0 > factors[4] > factors[5] > 0
    assert [learning_rate_factor(s, "constant") for s in shares[2:]] == [1.0] * 4


def test_budget_counts_steps_or_minutes() -> None:
    assert Budget(steps=10).progress(5, 1e9) == 0.5
    assert Budget(steps=10, minutes=2).progress(500, 60) == 0.5
