"""A few steps of the whole recipe at a tiny size: files, resuming, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import small_preset

from echo_ray.errors import ConfigError, WeightsError
from echo_ray.preset import Preset
from echo_ray.training.__main__ import main, trained_codec
from echo_ray.training.bank import bank_digest, build, load_or_build
from echo_ray.training.codec_stage import CodecStage
from echo_ray.training.dit_stage import DitStage, VideoModel, find_objects, split_parameters
from echo_ray.training.export import write_weights
from echo_ray.training.loop import StepRandom, run_stage, step_random
from echo_ray.training.recipe import Budget, Recipe, learning_rate_factor
from echo_ray.weights.folder import WeightsFolder
from echo_ray.weights.modules import load_modules
from echo_ray.weights.verify import verify

RECIPE = Recipe(codec_batch=2, clips=4, chunks=6, short_chunks=3, dit_batch=2, bf16=False)


@pytest.fixture
def preset() -> Preset:
    return small_preset()


def run(
    stage: CodecStage | DitStage,
    steps: int,
    out: Path,
    resume: bool = False,
    save_every_s: float = 1e9,
) -> None:
    budget = Budget(steps=steps)
    run_stage(stage, budget, 7, out, resume=resume, checkpoint_every_s=save_every_s)


def dit_stage(preset: Preset, out: Path, kind: type[DitStage] = DitStage) -> DitStage:
    codec = trained_codec(preset, out)
    bank = build(preset, RECIPE, codec, "x", workers=1)
    return kind(preset, RECIPE, bank, codec, compiled=False)


def test_codec_then_transformer_leave_weights_that_serve(preset: Preset, tmp_path: Path) -> None:
    codec_stage = CodecStage(preset, RECIPE)
    run(codec_stage, 3, tmp_path)
    stage = dit_stage(preset, tmp_path)
    run(stage, 4, tmp_path)
    folder = WeightsFolder.open(tmp_path)
    folder.check(preset)
    assert verify(tmp_path, preset).problems == []
    modules = load_modules(preset, folder, torch.device("cpu"))
    average = stage.average.state_dict()
    assert torch.allclose(modules.dit.head.head.weight, average["dit.head.head.weight"], atol=1e-3)
    assert torch.allclose(modules.codec.mean, codec_stage.codec.mean, atol=1e-2)
    assert (tmp_path / "samples_000004.png").stat().st_size > 0
    assert set(json.loads((tmp_path / "dit_loss.json").read_text())) == {"step", "loss"}


def test_weights_are_replaced_with_their_manifest(preset: Preset, tmp_path: Path) -> None:
    model, codec = VideoModel(preset), CodecStage(preset, RECIPE).codec
    write_weights(preset, model, codec, tmp_path / "new")
    first = WeightsFolder.open(tmp_path / "new").digest
    with torch.no_grad():
        model.dit.head.head.bias += 1
    write_weights(preset, model, codec, tmp_path / "new")
    second = WeightsFolder.open(tmp_path / "new")
    assert second.digest != first
    assert torch.equal(second.part("dit")["head.head.bias"], model.dit.head.head.bias.half())


def test_the_codec_learns_to_draw_what_it_is_shown(preset: Preset) -> None:
    stage = CodecStage(preset, RECIPE)
    losses = [stage.train_step(step_random(7, "codec", 0), 0.0) for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]


def test_the_transformer_learns_a_batch(preset: Preset, tmp_path: Path) -> None:
    run(CodecStage(preset, RECIPE), 1, tmp_path)
    stage = dit_stage(preset, tmp_path)
    losses = [stage.train_step(step_random(7, "dit", 0), 0.0) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]


def test_objects_are_found_and_erased_from_some_pasts(preset: Preset, tmp_path: Path) -> None:
    run(CodecStage(preset, RECIPE), 1, tmp_path)
    stage = dit_stage(preset, tmp_path)
    latents = torch.full((40, 6, 4, 4, 4), 0.3)
    latents[..., 1:3, 1:3] = -2.0
    objects, background = find_objects(latents)
    assert torch.equal(objects, latents[:, :, 0] < 0)
    assert background.unique().item() == pytest.approx(0.3)
    stage.recipe = replace(RECIPE, lost_objects=0.0)
    assert torch.equal(stage._erase(latents, step_random(7, "dit", 0)), latents)
    stage.recipe = replace(RECIPE, lost_objects=1.0)
    erased = stage._erase(latents, step_random(7, "dit", 0))
    changed = (erased != latents).any(dim=2)
    assert not (changed & ~objects).any()
    assert 0.2 < float(changed[objects].float().mean()) < 0.6
    assert erased[changed[:, :, None].expand_as(erased)].unique().item() == pytest.approx(0.3)


class Interrupted(DitStage):
    """Stops in its third step, as a killed process would."""

    def train_step(self, random: StepRandom, progress: float) -> float:
        if self.averaged_steps == 2:
            raise KeyboardInterrupt
        return super().train_step(random, progress)


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(preset: Preset, tmp_path: Path) -> None:
    run(CodecStage(preset, RECIPE), 2, tmp_path)
    whole, resumed = dit_stage(preset, tmp_path), dit_stage(preset, tmp_path)
    run(whole, 4, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(dit_stage(preset, tmp_path, Interrupted), 4, tmp_path / "parts", save_every_s=0)
    run(resumed, 4, tmp_path / "parts", resume=True)
    for name, value in whole.average.state_dict().items():
        assert torch.equal(value, resumed.average.state_dict()[name]), name


def test_random_numbers_of_a_step_depend_on_its_place_only() -> None:
    a, b = step_random(7, "dit", 5), step_random(7, "dit", 5)
    assert a.data.integers(1 << 30) == b.data.integers(1 << 30)
    assert torch.equal(torch.randn(3, generator=a.noise), torch.randn(3, generator=b.noise))
    other = [step_random(8, "dit", 5), step_random(7, "codec", 5), step_random(7, "dit", 6)]
    draws = {int(r.data.integers(1 << 30)) for r in [*other, step_random(7, "dit", 5)]}
    assert len(draws) == 4


def test_another_encoder_means_another_bank(preset: Preset, tmp_path: Path) -> None:
    stage = CodecStage(preset, RECIPE)
    first = load_or_build(preset, RECIPE, stage.codec, tmp_path / "bank.pt", workers=1)
    again = load_or_build(preset, RECIPE, stage.codec, tmp_path / "bank.pt", workers=1)
    assert torch.equal(first.latents_SFChw, again.latents_SFChw)
    digest = bank_digest(stage.codec, RECIPE)
    stage.train_step(step_random(7, "codec", 0), 0.0)
    assert bank_digest(stage.codec, RECIPE) != digest
    changed = load_or_build(preset, RECIPE, stage.codec, tmp_path / "bank.pt", workers=1)
    assert not torch.equal(first.latents_SFChw, changed.latents_SFChw)


def test_every_parameter_has_one_optimizer(preset: Preset) -> None:
    model = VideoModel(preset)
    matrices, rest = split_parameters(model)
    assert len(matrices) + len(rest) == len(list(model.parameters()))
    assert all(p.ndim == 2 for p in matrices)
    assert any(p is model.text.words.weight for p in rest)


def test_learning_rate_rises_stays_and_falls() -> None:
    shares = [0.0, 0.01, 0.1, 0.5, 0.75, 1.0]
    factors = [learning_rate_factor(s) for s in shares]
    assert factors[0] < factors[1] < factors[2] == factors[3] == 1.0 > factors[4] > factors[5] > 0


def test_budget_counts_steps_or_minutes() -> None:
    assert Budget(steps=10).progress(5, 1e9) == 0.5
    assert Budget(steps=10, minutes=2).progress(500, 60) == 0.5


def test_weights_that_are_not_finite_are_not_written(preset: Preset, tmp_path: Path) -> None:
    model, codec = VideoModel(preset), CodecStage(preset, RECIPE).codec
    with torch.no_grad():
        model.dit.head.head.bias[0] = float("nan")
    with pytest.raises(WeightsError, match=r"dit\.head\.head\.bias"):
        write_weights(preset, model, codec, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_shape_is_refused(preset: Preset, tmp_path: Path) -> None:
    run(CodecStage(preset, RECIPE), 1, tmp_path)
    torch.save({"stage": {"codec": {}}}, tmp_path / "codec.pt")
    with pytest.raises(WeightsError, match="start without --resume"):
        run(CodecStage(preset, RECIPE), 2, tmp_path, resume=True)


def test_the_command_refuses_what_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path), "--stage", "dit"]) == 1
    assert "train the codec first" in capsys.readouterr().err
    assert main(["--out", str(tmp_path), "--preset", "nonsense"]) == 1
    assert "nonsense" in capsys.readouterr().err
    assert main(["--out", str(tmp_path), "--minutes", "-1"]) == 1
    assert "--minutes" in capsys.readouterr().err


def test_a_recipe_with_impossible_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"recipe\.short_chunks"):
        Recipe(short_chunks=11)
    with pytest.raises(ConfigError, match=r"recipe\.dit_batch"):
        Recipe(dit_batch=0)
