"""Stages of the recipe over the small preset, with a bank of a few random clips."""

from __future__ import annotations

from typing import Any

import torch
from small import small_preset

from echo_ray.config import from_mapping
from echo_ray.preset import Preset
from echo_ray.training.bank import Bank
from echo_ray.training.fewstep_stage import FewstepStage
from echo_ray.training.loop import step_random
from echo_ray.training.pretrain_stage import PretrainStage
from echo_ray.training.recipe import (
    FewstepRecipe,
    PretrainRecipe,
    StreamingRecipe,
    TeacherRecipe,
)
from echo_ray.training.streaming_stage import StreamingStage
from echo_ray.training.teacher import TeacherStage
from echo_ray.training.trainable import new_codec
from echo_ray.training.video_model import VideoModel
from echo_ray.training.video_stage import Materials, VideoStage

STAGES: dict[str, tuple[type, type]] = {
    "teacher": (TeacherRecipe, TeacherStage),
    "pretrain": (PretrainRecipe, PretrainStage),
    "fewstep": (FewstepRecipe, FewstepStage),
    "streaming": (StreamingRecipe, StreamingStage),
}
BATCH = {"teacher": "teacher", "pretrain": "pretrain", "fewstep": "rollout", "streaming": "rollout"}
CPU = torch.device("cpu")


def lively_model(preset: Preset, seed: int = 3, *, with_memory: bool = True) -> VideoModel:
    """A model whose output is not nothing, as that of a fresh one is."""
    torch.manual_seed(seed)
    model = VideoModel(preset, with_memory=with_memory)
    torch.nn.init.normal_(model.dit.head.head.weight, std=0.3)
    return model


def small_bank(chunks: int, clips: int = 4) -> Bank:
    """Random latents; captions change once in each clip, and every third chunk is empty."""
    source = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 20, (clips, 2, 6), generator=source).to(torch.uint8)
    return Bank(
        torch.randn(clips, 3 * chunks, 4, 4, 4, generator=source).half(),
        ids.repeat_interleave((chunks + 1) // 2, dim=1)[:, :chunks],
        (torch.arange(chunks) % 3 == 0).expand(clips, -1).clone(),
        torch.arange(clips).to(torch.uint8) % 2 + 1,
        (),
        "small",
    )


def small_recipe(stage: str, **sections: Any) -> Any:
    """A recipe of two clips a step, in float32, without sheets; keywords are its sections."""
    data: dict[str, Any] = {"stage": stage, "init_from": "nowhere", "preset": "small"}
    data |= {"run": {"steps": 4, "bf16": False, "sheet_chunks": 0}, "ema": {"decay": 0.9}}
    data[BATCH[stage]] = {"batch": 2}
    if stage == "fewstep":
        data["fewstep"] = {"chunks": 6}
    for name, value in sections.items():
        data[name] = data[name] | value if isinstance(data.get(name), dict) else value
    return from_mapping(STAGES[stage][0], data)


def small_stage(
    stage: str, chunks: int = 6, *, preset: Preset | None = None, **sections: Any
) -> Any:
    """A stage with a lively model; every one made of the same arguments is the same."""
    preset = preset or small_preset()
    torch.manual_seed(4)
    codec = new_codec(preset).eval().requires_grad_(requires_grad=False)
    model = lively_model(preset, with_memory=stage != "teacher")
    teacher = lively_model(preset, seed=8, with_memory=False)
    materials = Materials(model, codec, small_bank(chunks), teacher=teacher)
    made: VideoStage = STAGES[stage][1](preset, small_recipe(stage, **sections), materials)
    return made


def losses_of(stage: Any, steps: int, name: str = "loss", *, same: bool = True) -> list[float]:
    """What the stage measures over some steps, all of them with the same batch and noise."""
    found = [stage.train_step(step_random(7, "rig", 0 if same else n), 0.9) for n in range(steps)]
    return [losses[name] for losses in found if name in losses]
