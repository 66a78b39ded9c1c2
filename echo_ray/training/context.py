"""What is done to clean latents before they become a training context, and how they are weighed.

Shapes: B clips, K chunks, F frames, C channels, H W latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from echo_ray.training.loop import StepRandom

OBJECT_DISTANCE = 0.5
"""Mean distance per channel, in standard deviations, beyond which a latent shows an object."""
USUAL_SHARE = 0.2
"""Of a frame's latents, how many usually belong to objects."""
EVENLY = (1.0, 3.0)
"""How much more each latent of small objects may count."""


def find_objects(latents_BFCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Where objects are [B, F, H, W]: far from the frame's median; and that median."""
    background = latents_BFCHW.flatten(3).median(dim=-1).values[..., None, None]
    differs = (latents_BFCHW - background).abs().mean(dim=2)
    return differs > OBJECT_DISTANCE, background


def latent_weight(x0_BFCHW: Tensor, object_weight: float) -> Tensor:
    """Weight [B, F, H, W] of each latent: how much more objects count than their background.

    Small objects count more per latent than large ones, or their colour is learned last.
    """
    objects, _ = find_objects(x0_BFCHW)
    share = objects.float().mean((2, 3), keepdim=True)
    evenly = (USUAL_SHARE / share).clamp(*EVENLY)
    return 1 + (object_weight - 1) * objects * evenly


def with_noise(latents_BFCHW: Tensor, most: float, random: StepRandom) -> Tensor:
    """A little noise on half of the clips, as generated latents have errors."""
    batch = latents_BFCHW.shape[0]
    size = random.data.uniform(0, most, batch) * (random.data.random(batch) < 0.5)
    scale = torch.from_numpy(size).float()[:, None, None, None, None]
    noise = torch.randn(latents_BFCHW.shape, generator=random.noise)
    return latents_BFCHW + (scale * noise).to(latents_BFCHW.device)


def erase_objects(latents_BFCHW: Tensor, share: float, chunks: int, random: StepRandom) -> Tensor:
    """Replace objects by background, half or all of them, in random chunks of some clips."""
    batch, frames, _, height, width = latents_BFCHW.shape
    rate = (random.data.random((batch, 1)) < share) * (random.data.random((batch, chunks)) < 0.5)
    rate = rate * random.data.choice((0.5, 1.0), (batch, chunks))
    rate_BF = torch.from_numpy(rate).float().repeat_interleave(frames // chunks, dim=1)
    hit = torch.rand(batch, frames, height, width, generator=random.noise)
    chosen = (hit < rate_BF[..., None, None]).to(latents_BFCHW.device)
    objects, background = find_objects(latents_BFCHW)
    return torch.where((objects & chosen)[:, :, None], background, latents_BFCHW)


def find_returns(hidden_BK: Tensor) -> Tensor:
    """Chunks [B, K] that show an object again after it has been away."""
    shown = ~hidden_BK
    before = shown.int().cumsum(dim=1) - shown.int() > 0
    was_hidden = hidden_BK.roll(1, dims=1)
    was_hidden[:, 0] = False
    return shown & before & was_hidden


def draw_repeats(most: int, random: StepRandom) -> int:
    """By how many chunks a hidden one is drawn out: by none in half of the cases."""
    if most == 0 or random.data.random() < 0.5:
        return 0
    return int(random.data.integers(1, most + 1))
