"""A recipe carried out: its stage is made from the folders it names, and run into its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import assert_never

import torch

from echo_ray.errors import ConfigError
from echo_ray.preset import Preset, load_preset
from echo_ray.training.bank import load_or_build
from echo_ray.training.budget import Budget
from echo_ray.training.codec_stage import CodecStage
from echo_ray.training.fewstep_stage import FewstepStage
from echo_ray.training.group import first_process_first, process_rank, training_group
from echo_ray.training.loop import CHECKPOINT, Progress, Stage, run_stage
from echo_ray.training.pretrain_stage import PretrainStage
from echo_ray.training.prompts import prompt_bank
from echo_ray.training.recipe import (
    CodecRecipe,
    FewstepRecipe,
    PretrainRecipe,
    Recipe,
    RolloutRecipe,
    StreamingRecipe,
    TeacherRecipe,
    VideoRecipe,
)
from echo_ray.training.recipe_file import find_recipes, named_folder, read_recipe
from echo_ray.training.streaming_stage import StreamingStage
from echo_ray.training.teacher import TeacherStage
from echo_ray.training.video_model import (
    VideoModel,
    load_codec,
    load_video_model,
    read_captions,
    training_device,
)
from echo_ray.training.video_stage import Materials
from echo_ray.weights.folder import WeightsFolder


def train(
    names: Sequence[str],
    out: Path,
    *,
    assignments: Sequence[str] = (),
    resume: bool = False,
    minutes: float | None = None,
) -> list[Progress]:
    """Carry out one recipe after the other, each into a folder of its own in `out`.

    All recipes are read before the first begins. Raises `ConfigError`, `ModelUnknown`,
    `WeightsError`.
    """
    files = [file for name in names for file in find_recipes(name)]
    recipes = [read_recipe(file, assignments) for file in files]
    folders = [folder_name(recipe) for recipe in recipes]
    for recipe, folder in zip(recipes, folders, strict=True):
        if folders.count(folder) > 1:
            raise ConfigError(
                f"two recipes of the stage {recipe.stage} would share the folder {out / folder}; "
                "give each a run.folder, or one after the other, each with an --out of its own",
                param="--config",
            )
    if minutes is not None:
        recipes = [replace(r, run=replace(r.run, minutes=minutes)) for r in recipes]
    with training_group():
        return [carry_out(recipe, out, resume=resume) for recipe in recipes]


def carry_out(recipe: Recipe, out: Path, *, resume: bool) -> Progress:
    """Run one stage to its end; with `resume`, on from the checkpoint that it left."""
    run = recipe.run
    torch.set_num_threads(run.threads)
    torch.manual_seed(run.seed)
    stage = make_stage(preset_of(recipe), recipe, out)
    folder = out / folder_name(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    if not process_rank():
        text = json.dumps(asdict(recipe), indent=1)
        (folder / "recipe.json").write_text(text + "\n", encoding="utf-8")
    return run_stage(
        stage,
        Budget(steps=run.steps, minutes=run.minutes),
        run.seed,
        folder,
        resume=resume and (folder / CHECKPOINT).exists(),
        checkpoint_every_s=run.checkpoint_every_s,
        schedule=recipe.optimizer.schedule,
    )


def folder_name(recipe: Recipe) -> str:
    return recipe.run.folder or recipe.stage


def preset_of(recipe: Recipe) -> Preset:
    """The recipe's preset, with its own cache if it has one. Raises `ModelUnknown`."""
    preset = load_preset(recipe.preset)
    if isinstance(recipe, VideoRecipe) and recipe.cache is not None:
        preset = replace(preset, cache=recipe.cache)
    return preset


def make_stage(preset: Preset, recipe: Recipe, out: Path) -> Stage:
    """The stage of a recipe with everything that it begins with."""
    match recipe:
        case CodecRecipe():
            return CodecStage(preset, recipe)
        case TeacherRecipe():
            return TeacherStage(preset, recipe, _materials(preset, recipe, out))
        case PretrainRecipe():
            return PretrainStage(preset, recipe, _materials(preset, recipe, out))
        case FewstepRecipe():
            return FewstepStage(preset, recipe, _materials(preset, recipe, out))
        case StreamingRecipe():
            return StreamingStage(preset, recipe, _materials(preset, recipe, out))
        case _:
            assert_never(recipe)


def _materials(preset: Preset, recipe: VideoRecipe, out: Path) -> Materials:
    device = training_device(recipe.run.device)
    start = named_folder(recipe.init_from, out, recipe.preset)
    codec = load_codec(preset, start, device)
    whole = isinstance(recipe, TeacherRecipe)
    model = load_video_model(preset, start, recipe.fresh, device, with_memory=not whole)
    teacher: VideoModel | None = None
    if isinstance(recipe, RolloutRecipe) and recipe.dmd is not None:
        folder = named_folder(recipe.dmd.teacher, out, recipe.preset)
        teacher = load_video_model(preset, folder, (), device, with_memory=False)
    if recipe.clips.prompts is not None:
        prompts = named_folder(recipe.clips.prompts, out, recipe.preset)
        bank = prompt_bank(preset, recipe.clips, prompts)
    else:
        with first_process_first():
            bank = load_or_build(preset, recipe.clips, codec, out, bf16=recipe.run.bf16)
    read_captions(preset, start, bank.captions, model, teacher)
    return Materials(model, codec, bank, WeightsFolder.open(start), teacher)
