"""Codec and pre-training at a tiny size; what every stage leaves behind, and resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_preset
from training_rig import CPU, lively_model, losses_of, small_bank, small_stage

from echo_ray.errors import ConfigError, WeightsError
from echo_ray.preset import Preset
from echo_ray.training.bank import bank_digest, load_or_build, take
from echo_ray.training.budget import Budget
from echo_ray.training.codec_stage import CodecStage
from echo_ray.training.context import (
    draw_repeats,
    erase_objects,
    find_objects,
    find_returns,
    latent_weight,
)
from echo_ray.training.export import write_weights
from echo_ray.training.loop import Progress, Stage, run_stage, step_random
from echo_ray.training.pretrain_stage import pick_clips
from echo_ray.training.recipe import ClipsSection, CodecRecipe, CodecSection, RunSection
from echo_ray.training.trainable import new_codec
from echo_ray.training.video_model import load_codec, load_video_model, training_device
from echo_ray.weights.folder import WeightsFolder
from echo_ray.weights.modules import load_modules
from echo_ray.weights.verify import verify

CODEC = CodecRecipe(stage="codec", run=RunSection(steps=3, bf16=False), codec=CodecSection(batch=2))


@pytest.fixture
def preset() -> Preset:
    return small_preset()


def run(
    stage: Stage, steps: int, out: Path, *, resume: bool = False, save_every_s: float = 1e9
) -> Progress:
    budget = Budget(steps=steps)
    return run_stage(stage, budget, 7, out, resume=resume, checkpoint_every_s=save_every_s)


def test_the_codec_learns_to_draw_what_it_is_shown(preset: Preset) -> None:
    losses = losses_of(CodecStage(preset, CODEC), 60)
    assert losses[-1] < 0.7 * losses[0]


def test_a_codec_leaves_a_folder_that_later_stages_begin_from(
    preset: Preset, tmp_path: Path
) -> None:
    stage = CodecStage(preset, CODEC)
    run(stage, 3, tmp_path)
    codec = load_codec(preset, tmp_path, CPU)
    assert torch.allclose(codec.mean, stage.codec.mean, atol=1e-2)
    assert not any(p.requires_grad for p in codec.parameters())
    assert (tmp_path / "sheet_000003.png").stat().st_size > 0
    assert float((tmp_path / "psnr.txt").read_text().split()[1]) > 0
    with pytest.raises(WeightsError, match="no weights of dit"):
        load_video_model(preset, tmp_path, (), CPU)


def test_a_loss_that_is_measured_now_and_then_has_a_curve() -> None:
    progress = Progress()
    for step in range(40):
        progress.take({"every": 1.0} | ({} if step % 5 else {"fifth": 1.0}), 0.1)
    assert [step for step, _ in progress.curves["every"]] == [1, 10, 20, 30, 40]
    assert [step for step, _ in progress.curves["fifth"]] == [1, 11, 21, 31]


def test_pretraining_leaves_weights_that_serve(preset: Preset, tmp_path: Path) -> None:
    stage = small_stage("pretrain", pretrain={"short_chunks": 3}, run={"sheet_chunks": 2})
    run(stage, 4, tmp_path)
    folder = WeightsFolder.open(tmp_path)
    folder.check(preset)
    assert verify(tmp_path, preset).problems == []
    modules = load_modules(preset, folder, CPU)
    average = stage.average.model.state_dict()
    assert torch.allclose(modules.dit.head.head.weight, average["dit.head.head.weight"], atol=1e-3)
    assert (tmp_path / "sheet_000004.png").stat().st_size > 0
    assert set(json.loads((tmp_path / "curves.json").read_text())) == {"loss"}
    model = load_video_model(preset, tmp_path, ("memory",), CPU)
    assert torch.equal(model.dit.head.head.bias, modules.dit.head.head.bias)
    assert model.memory is not None
    assert not torch.equal(model.memory.query_init, modules.memory.query_init)  # type: ignore[union-attr]


def test_weights_are_replaced_with_their_manifest(preset: Preset, tmp_path: Path) -> None:
    model, codec = lively_model(preset), new_codec(preset)
    write_weights(preset, model, codec, tmp_path / "new")
    first = WeightsFolder.open(tmp_path / "new").digest
    with torch.no_grad():
        model.dit.head.head.bias += 1
    write_weights(preset, model, codec, tmp_path / "new")
    second = WeightsFolder.open(tmp_path / "new")
    assert second.digest != first
    assert torch.equal(second.part("dit")["head.head.bias"], model.dit.head.head.bias.half())


def test_weights_that_are_not_finite_are_not_written(preset: Preset, tmp_path: Path) -> None:
    model = lively_model(preset)
    for value in (float("nan"), 1e6):
        with torch.no_grad():
            model.dit.head.head.bias[0] = value
        with pytest.raises(WeightsError, match=r"dit\.head\.head\.bias"):
            write_weights(preset, model, new_codec(preset), tmp_path)
    assert not list(tmp_path.iterdir())


def test_pretraining_learns_a_batch() -> None:
    stage = small_stage("pretrain", pretrain={"short_chunks": 3}, optimizer={"lr": 1e-2})
    losses = losses_of(stage, 12)
    assert losses[-1] < 0.9 * losses[0]


def test_a_return_is_the_first_sight_after_an_absence() -> None:
    rows = ("..##..", "##..#.", "......", "######", "#.#.#.")
    hidden = torch.tensor([[c == "#" for c in row] for row in rows])
    found = ["".join("r" if r else "." for r in row) for row in find_returns(hidden).tolist()]
    assert found == ["....r.", ".....r", "......", "......", "...r.r"]


def test_objects_are_found_and_erased_from_some_pasts() -> None:
    latents = torch.full((40, 6, 4, 4, 4), 0.3)
    latents[..., 1:3, 1:3] = -2.0
    objects, background = find_objects(latents)
    assert torch.equal(objects, latents[:, :, 0] < 0)
    assert background.unique().item() == pytest.approx(0.3)
    assert torch.equal(erase_objects(latents, 0.0, 2, step_random(7, "rig", 0)), latents)
    erased = erase_objects(latents, 1.0, 2, step_random(7, "rig", 0))
    changed = (erased != latents).any(dim=2)
    assert not (changed & ~objects).any()
    assert 0.2 < float(changed[objects].float().mean()) < 0.6
    assert erased[changed[:, :, None].expand_as(erased)].unique().item() == pytest.approx(0.3)


def test_small_objects_count_more_for_their_area_within_bounds() -> None:
    latents = torch.full((1, 4, 4, 8, 8), 0.3)
    for frame, side in enumerate((2, 3, 5)):
        latents[:, frame, :, :side, :side] = -2.0
    (weight,) = latent_weight(latents, 4.0)
    extra = (weight - 1).sum((1, 2)).tolist()
    assert extra == pytest.approx([3 * 3 * 4, 3 * 0.2 * 64, 3 * 25, 0.0])
    assert (weight[3] == 1).all(), "an empty frame is background"


def test_hidden_chunks_are_drawn_out_in_half_of_the_cases() -> None:
    drawn = [draw_repeats(5, step_random(7, "rig", n)) for n in range(300)]
    assert set(drawn) == {0, 1, 2, 3, 4, 5}
    assert 0.4 < drawn.count(0) / 300 < 0.6
    assert draw_repeats(0, step_random(7, "rig", 0)) == 0


def test_a_curriculum_begins_with_one_object() -> None:
    bank = small_bank(6, clips=8)
    for n in range(5):
        picked = pick_clips(bank, 6, step_random(7, "rig", n), single=True)
        assert bank.objects_S[picked].eq(1).all()
    many = torch.cat(
        [pick_clips(bank, 6, step_random(7, "rig", n), single=False) for n in range(5)]
    )
    assert bank.objects_S[many].eq(2).any()
    crowded = replace(bank, objects_S=torch.full((8,), 2))
    assert len(pick_clips(crowded, 6, step_random(7, "rig", 0), single=True)) == 6


RESUMED: dict[str, dict[str, Any]] = {
    "codec": {},
    "teacher": {"teacher": {"chunks": 3}},
    "pretrain": {"pretrain": {"short_chunks": 3}, "optimizer": {"kind": "muon"}},
    "fewstep": {"rollout": {"objective": "dmd"}, "dmd": {"teacher": "nowhere", "ratio": 2}},
    "streaming": {
        "streaming": {"clip_chunks": 5},
        "lora": {"rank": 2},
        "rollout": {"fast_forward": 3},
    },
}


def made(name: str) -> Any:
    return (
        CodecStage(small_preset(), CODEC)
        if name == "codec"
        else (small_stage(name, 13 if name == "streaming" else 6, **RESUMED[name]))
    )


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_was_cut_off_goes_on_as_if_nothing_had_been(name: str, tmp_path: Path) -> None:
    whole, resumed, broken = (made(name) for _ in range(3))
    run(whole, 4, tmp_path / "whole")
    step = broken.train_step

    def breaking(random: Any, progress: float) -> Any:
        if random.step == 2:
            raise Interrupted
        return step(random, progress)

    broken.train_step = breaking
    with pytest.raises(Interrupted):
        run(broken, 4, tmp_path / "parts", save_every_s=0)
    progress = run(resumed, 4, tmp_path / "parts", resume=True)
    assert progress.step == 4
    pairs = zip(tensors(whole.state()), tensors(resumed.state()), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert len(tensors(whole.state())) > 10
    optimizers = zip(whole.optimizers(), resumed.optimizers(), strict=True)
    for one, other in optimizers:
        states = zip(tensors(one.state_dict()), tensors(other.state_dict()), strict=True)
        assert all(torch.equal(a, b) for a, b in states)


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors of nested plain values."""
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    return [t for v in inner for t in tensors(v)] if isinstance(value, dict | list | tuple) else []


def test_a_checkpoint_of_another_shape_is_refused(preset: Preset, tmp_path: Path) -> None:
    run(CodecStage(preset, CODEC), 1, tmp_path)
    torch.save({"stage": {"codec": {}}}, tmp_path / "checkpoint.pt")
    with pytest.raises(WeightsError, match="start without --resume"):
        run(CodecStage(preset, CODEC), 2, tmp_path, resume=True)


def test_random_numbers_of_a_step_depend_on_its_place_only() -> None:
    a, b = step_random(7, "pretrain", 5), step_random(7, "pretrain", 5)
    assert a.data.integers(1 << 30) == b.data.integers(1 << 30)
    assert torch.equal(torch.randn(3, generator=a.noise), torch.randn(3, generator=b.noise))
    places = [(8, "pretrain", 5), (7, "codec", 5), (7, "pretrain", 6), (7, "pretrain", 5)]
    assert len({int(step_random(*place).data.integers(1 << 30)) for place in places}) == 4


def test_another_encoder_or_other_clips_mean_another_bank(preset: Preset, tmp_path: Path) -> None:
    stage, section = CodecStage(preset, CODEC), ClipsSection(count=3, chunks=4)

    def built(section: ClipsSection) -> torch.Tensor:
        return load_or_build(preset, section, stage.codec, tmp_path, bf16=False).latents_SFChw

    first = built(section)
    assert torch.equal(first, built(section))
    assert not torch.equal(first, built(replace(section, seed=8)))
    digest = bank_digest(preset, stage.codec, section)
    stage.train_step(step_random(7, "codec", 0), 0.0)
    assert bank_digest(preset, stage.codec, section) != digest
    assert not torch.equal(first, built(section))
    assert len(list(tmp_path.glob("bank-*.pt"))) == 3


def test_a_bank_knows_what_its_clips_show(preset: Preset, tmp_path: Path) -> None:
    section = ClipsSection(count=24, chunks=6)
    bank = load_or_build(preset, section, new_codec(preset), tmp_path, bf16=False)
    assert bank.latents_SFChw.shape == (24, 18, 4, 4, 4)
    assert bank.ids_SKL.shape == (24, 6, 6)
    assert bank.hidden_SK.any()
    assert not bank.hidden_SK.all()
    assert int(bank.objects_S.max()) >= 1
    batch = take(bank, torch.tensor([3, 1]), range(2, 5), 3, CPU)
    assert torch.equal(batch.latents_BFChw, bank.latents_SFChw[[3, 1], 6:15].float())
    assert torch.equal(batch.ids_BKL, bank.ids_SKL[[3, 1], 2:5].long())
    assert torch.equal(batch.hidden_BK, bank.hidden_SK[[3, 1], 2:5])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run\.device: cuda is not available"):
        training_device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["teacher", "pretrain", "fewstep", "streaming"])
def test_every_stage_trains_on_a_gpu(name: str) -> None:
    sections = dict(RESUMED[name])
    stage = small_stage(
        name, 13 if name == "streaming" else 6, run={"device": "cuda", "bf16": True}, **sections
    )
    for n in range(2):
        losses = stage.train_step(step_random(7, "rig", n), 0.9)
        assert all(loss == loss for loss in losses.values())
