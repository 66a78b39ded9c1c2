"""What every stage of the video model shares: weights, average, optimiser, files at checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echo_ray.model.codec import Codec
from echo_ray.preset import Preset
from echo_ray.training.bank import Bank
from echo_ray.training.export import write_weights
from echo_ray.training.fast import choose_block
from echo_ray.training.lora import add_lora
from echo_ray.training.optimise import Average, Updater
from echo_ray.training.recipe import VideoRecipe
from echo_ray.training.sampling import sample_sheet
from echo_ray.training.video_model import VideoModel, training_device
from echo_ray.weights.folder import WeightsFolder
from echo_ray.weights.modules import load_modules


@dataclass(frozen=True, slots=True)
class Materials:
    """What a stage begins with."""

    model: VideoModel
    codec: Codec
    bank: Bank
    start: WeightsFolder | None = None
    """Where parts come from that are neither trained nor small enough to be written again."""
    teacher: VideoModel | None = None
    """Frozen; only for distribution matching."""


class VideoStage:
    """Trains a video model from a bank of latents; keeps an average of its weights."""

    name = "video"

    def __init__(self, preset: Preset, recipe: VideoRecipe, materials: Materials) -> None:
        self.preset, self.run = preset, recipe.run
        self.bank, self.codec, self.start = materials.bank, materials.codec, materials.start
        self.device = training_device(recipe.run.device)
        self.frames = preset.cache.frames_per_chunk
        torch.manual_seed(recipe.run.seed)
        self.model = materials.model
        if recipe.lora is not None:
            self.model.text.requires_grad_(requires_grad=False)
            add_lora(self.model.dit, recipe.lora)
        self.average = Average(self.model, recipe.ema)
        self.updater = Updater(self.model, recipe.optimizer)
        self.block = choose_block(recipe.run.compile)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.bf16)

    def update(self, loss: Tensor) -> None:
        """Follow the loss, and let the average follow the weights."""
        self.updater.step(loss)
        self.average.follow(self.model)

    def optimizers(self) -> Iterable[torch.optim.Optimizer]:
        return self.updater.optimizers

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "average": self.average.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.restore(state["average"])

    def at_checkpoint(self, out: Path, step: int) -> None:
        """Weights that can be served, and what they make of a few prompts."""
        write_weights(self.preset, self.average.model, self.codec, out, self.start)
        if self.run.sheet_chunks:
            modules = load_modules(self.preset, WeightsFolder.open(out), self.device)
            file = out / f"sheet_{step:06d}.png"
            sample_sheet(self.preset, modules, file, self.run.sheet_chunks)
