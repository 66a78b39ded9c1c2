"""Stage 0: the codec learns to draw groups of frames, moving shapes counted more than background.

Shapes: G groups, C channels, H W pixels, h w latents.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from echo_ray.preset import Preset
from echo_ray.scenes.world import random_groups, render
from echo_ray.training.export import write_weights
from echo_ray.training.loop import StepRandom
from echo_ray.training.optimise import Updater
from echo_ray.training.pictures import contact_sheet
from echo_ray.training.recipe import CodecRecipe
from echo_ray.training.trainable import new_codec
from echo_ray.training.video_model import training_device


class CodecStage:
    """Trains encoder and decoder together on short runs of random scenes."""

    name = "codec"

    def __init__(self, preset: Preset, recipe: CodecRecipe) -> None:
        torch.manual_seed(recipe.run.seed)
        self.preset, self.recipe = preset, recipe
        self.device = training_device(recipe.run.device)
        self.codec = new_codec(preset).to(self.device)
        self.updater = Updater(self.codec, recipe.optimizer)

    def train_step(self, random: StepRandom, progress: float) -> dict[str, float]:
        section = self.recipe.codec
        pixels, weight = self.batch(random.data, section.batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.run.bf16):
            raw = self.codec.encoder(2 * pixels - 1)
            spread = raw.detach().float().std(dim=(0, 2, 3), keepdim=True)
            share = torch.rand(raw.shape[0], 1, 1, 1, generator=random.noise).to(self.device)
            noise = torch.randn(raw.shape, generator=random.noise).to(self.device)
            drawn = self.codec.decoder(raw + noise * spread * share * section.noise)
        error = (drawn.float() + 1) / 2 - pixels
        loss = ((4 * error.square() + error.abs()) * weight).mean()
        self.updater.step(loss)
        return {"loss": float(loss.detach())}

    def batch(self, rng: np.random.Generator, groups: int) -> tuple[Tensor, Tensor]:
        """Pixels [G, 3 * stride, H, W] and the weight of each, near 1 on average."""
        stride = self.preset.codec.temporal_stride
        height, width = self.preset.height, self.preset.width
        frames = random_groups(rng, groups, stride, min(height, width))
        picture, covered = render(frames, height, width)
        pixels = torch.from_numpy(picture).reshape(groups, 3 * stride, height, width)
        # A pixel counts more if an object covers it in any frame of its group.
        swept = torch.from_numpy(covered).reshape(groups, stride, height, width).amax(1)
        weight = 1 + (self.recipe.codec.foreground_weight - 1) * (swept > 0).float()
        weight = weight[:, None].expand_as(pixels)
        return pixels.to(self.device), weight.to(self.device)

    @torch.no_grad()
    def normalise(self, groups: int = 512) -> None:
        """Set the latents' mean and spread per channel from fresh scenes."""
        rng = np.random.default_rng([self.recipe.run.seed, 99])
        raw = torch.cat(
            [self.codec.encoder(2 * self.batch(rng, 16)[0] - 1) for _ in range(groups // 16)]
        )
        self.codec.mean.copy_(raw.mean(dim=(0, 2, 3)))
        self.codec.std.copy_(raw.std(dim=(0, 2, 3)))

    @torch.no_grad()
    def psnr(self, groups: int = 128) -> float:
        """Decibels of the mean squared error on scenes that training has not seen."""
        pixels, _ = self.batch(np.random.default_rng([self.recipe.run.seed, 98]), groups)
        drawn = (self.codec.decoder(self.codec.encoder(2 * pixels - 1)) + 1) / 2
        error = (drawn.clamp(0, 1) - pixels).square().mean()
        return float(-10 * torch.log10(error))

    def optimizers(self) -> Iterable[torch.optim.Optimizer]:
        return self.updater.optimizers

    def state(self) -> dict[str, Any]:
        self.normalise()
        return {"codec": self.codec.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.codec.load_state_dict(state["codec"])

    def at_checkpoint(self, out: Path, step: int) -> None:
        pixels, _ = self.batch(np.random.default_rng([self.recipe.run.seed, 97]), 12)
        with torch.no_grad():
            drawn = (self.codec.decoder(self.codec.encoder(2 * pixels - 1)) + 1) / 2
        pairs = torch.stack([pixels[:, :3], drawn[:, :3], pixels[:, -3:], drawn[:, -3:]])
        contact_sheet(pairs, out / f"sheet_{step:06d}.png")
        write_weights(self.preset, None, self.codec, out)
        with (out / "psnr.txt").open("a", encoding="utf-8") as file:
            file.write(f"{step} {self.psnr():.2f}\n")
