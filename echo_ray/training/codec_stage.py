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
from echo_ray.training.loop import StepRandom
from echo_ray.training.pictures import contact_sheet
from echo_ray.training.recipe import Recipe
from echo_ray.training.trainable import new_codec


class CodecStage:
    """Trains encoder and decoder together on short runs of random scenes."""

    name = "codec"

    def __init__(self, preset: Preset, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        self.preset = preset
        self.recipe = recipe
        self.codec = new_codec(preset)
        self.optimizer = torch.optim.AdamW(
            self.codec.parameters(), lr=recipe.codec_lr, betas=(0.9, 0.99), weight_decay=1e-3
        )

    def train_step(self, random: StepRandom, progress: float) -> float:
        pixels, weight = self.batch(random.data, self.recipe.codec_batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
            raw = self.codec.encoder(2 * pixels - 1)
            spread = raw.detach().float().std(dim=(0, 2, 3), keepdim=True)
            share = torch.rand(raw.shape[0], 1, 1, 1, generator=random.noise)
            noise = torch.randn(raw.shape, generator=random.noise)
            drawn = self.codec.decoder(raw + noise * spread * share * self.recipe.codec_noise)
        error = (drawn.float() + 1) / 2 - pixels
        loss = ((4 * error.square() + error.abs()) * weight).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.codec.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def batch(self, rng: np.random.Generator, groups: int) -> tuple[Tensor, Tensor]:
        """Pixels [G, 3 * stride, H, W] and the weight of each, near 1 on average."""
        stride = self.preset.codec.temporal_stride
        height, width = self.preset.height, self.preset.width
        frames = random_groups(rng, groups, stride, min(height, width))
        picture, covered = render(frames, height, width)
        pixels = torch.from_numpy(picture).reshape(groups, 3 * stride, height, width)
        # A pixel counts more if an object covers it in any frame of its group.
        swept = torch.from_numpy(covered).reshape(groups, stride, height, width).amax(1)
        weight = 1 + (self.recipe.foreground_weight - 1) * (swept > 0).float()
        return pixels, weight[:, None].expand_as(pixels)

    @torch.no_grad()
    def normalise(self, groups: int = 512) -> None:
        """Set the latents' mean and spread per channel from fresh scenes."""
        rng = np.random.default_rng([self.recipe.seed, 99])
        raw = torch.cat(
            [self.codec.encoder(2 * self.batch(rng, 16)[0] - 1) for _ in range(groups // 16)]
        )
        self.codec.mean.copy_(raw.mean(dim=(0, 2, 3)))
        self.codec.std.copy_(raw.std(dim=(0, 2, 3)))

    @torch.no_grad()
    def psnr(self, groups: int = 128) -> float:
        """Decibels of the mean squared error on scenes that training has not seen."""
        pixels, _ = self.batch(np.random.default_rng([self.recipe.seed, 98]), groups)
        drawn = (self.codec.decoder(self.codec.encoder(2 * pixels - 1)) + 1) / 2
        error = (drawn.clamp(0, 1) - pixels).square().mean()
        return float(-10 * torch.log10(error))

    def optimizers(self) -> Iterable[torch.optim.Optimizer]:
        return (self.optimizer,)

    def state(self) -> dict[str, Any]:
        self.normalise()
        return {"codec": self.codec.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.codec.load_state_dict(state["codec"])

    def at_checkpoint(self, out: Path, step: int) -> None:
        pixels, _ = self.batch(np.random.default_rng([self.recipe.seed, 97]), 12)
        with torch.no_grad():
            drawn = (self.codec.decoder(self.codec.encoder(2 * pixels - 1)) + 1) / 2
        pairs = torch.stack([pixels[:, :3], drawn[:, :3], pixels[:, -3:], drawn[:, -3:]])
        contact_sheet(pairs, out / "codec.png")
        with (out / "codec_psnr.txt").open("a", encoding="utf-8") as file:
            file.write(f"{step} {self.psnr():.2f}\n")
