"""Distribution matching with all its parts: the student goes where only the teacher has been."""

from __future__ import annotations

from dataclasses import replace

import torch
from small import small_preset
from training_rig import CPU, lively_model, small_bank, small_recipe

from echo_ray.training.bank import take
from echo_ray.training.fewstep_stage import FewstepStage
from echo_ray.training.loop import step_random
from echo_ray.training.teacher import TeacherStage
from echo_ray.training.trainable import new_codec
from echo_ray.training.video_stage import Materials

CHUNKS, BATCH = 2, 8


def made(stage: FewstepStage) -> torch.Tensor:
    """What the student makes from fixed noise, stopped at a step that is always the same."""
    batch = take(stage.bank, torch.zeros(BATCH, dtype=torch.int64), range(CHUNKS), 3, CPU)
    random = step_random(7, "look", 0)
    with torch.no_grad():
        return stage.roll(stage.new_rollout(BATCH, random), batch, random).latents_BFCHW


def test_the_student_goes_where_only_the_teacher_has_been() -> None:
    """The student's objective never reads a latent of the bank; the teacher was trained on one."""
    preset = small_preset(point_every=0)
    bank = small_bank(CHUNKS, clips=1)
    flat = bank.latents_SFChw[..., :1, :1].expand(-1, -1, -1, 4, 4).contiguous()
    bank = replace(bank, latents_SFChw=flat)
    codec = new_codec(preset)
    section = {"chunks": CHUNKS, "batch": BATCH, "drop_caption": 0.0}
    recipe = small_recipe("teacher", teacher=section, optimizer={"lr": 1e-2})
    teacher = lively_model(preset, with_memory=False)
    teaching = TeacherStage(preset, recipe, Materials(teacher, codec, bank))
    for n in range(150):
        teaching.train_step(step_random(7, "teacher", n), 0.5)
    optimizer = {"lr": 5e-3, "betas": [0.0, 0.999]}
    recipe = small_recipe(
        "fewstep",
        optimizer=optimizer,
        rollout={"objective": "dmd", "batch": BATCH},
        fewstep={"chunks": CHUNKS},
        dmd={"teacher": "nowhere", "ratio": 2, "critic": optimizer},
    )
    hidden = replace(bank, latents_SFChw=torch.full_like(flat, float("nan")))
    student = lively_model(preset, seed=1)
    torch.nn.init.zeros_(student.dit.head.head.weight)
    stage = FewstepStage(preset, recipe, Materials(student, codec, hidden, teacher=teacher))
    truth = flat.float()
    before = float((made(stage) - truth).square().mean())
    for n in range(90):
        stage.train_step(step_random(7, "student", n), 0.5)
    after = float((made(stage) - truth).square().mean())
    assert after < 0.85 * before
