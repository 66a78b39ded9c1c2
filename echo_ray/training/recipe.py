"""The numbers of the recipe, and how far along a run is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from echo_ray.config import require


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything about a training run that is not the model's shape."""

    seed: int = 7
    codec_steps: int = 7_000
    codec_batch: int = 16
    """Groups of frames a step."""
    codec_lr: float = 1.5e-3
    codec_noise: float = 0.12
    """Largest noise on latents, in their own spread, that the decoder learns to ignore."""
    foreground_weight: float = 5.0
    clips: int = 2_400
    chunks: int = 10
    """Chunks a clip: enough to reach the cache's stationary regime."""
    short_chunks: int = 5
    """Chunks used of a clip in the first part of the training, where prompts are learned."""
    short_share: float = 0.5
    dit_steps: int = 3_000
    dit_batch: int = 8
    muon_lr: float = 3e-3
    adam_lr: float = 1.5e-3
    ema: float = 0.995
    context_noise: float = 0.15
    """Largest noise on the clean latents that become keys and values; half of the clips."""
    object_weight: float = 4.0
    """How much more latents of objects count than those of the background."""
    first_chunk_weight: float = 2.0
    """How much more the first chunk counts, where objects come into being."""
    lost_objects: float = 0.25
    """Share of clips whose past has chunks where the objects are partly or wholly erased: what a
    prompt names must come back after a failure."""
    hide_memory: float = 0.15
    """Share of clips that must do without memory, so that every cache policy is served."""
    rebuild_share: float = 0.3
    """Share of steps with one rebuild of the window, as at a prompt switch or a saved point."""
    bf16: bool = True
    checkpoint_every_s: float = 120.0

    def __post_init__(self) -> None:
        for name in ("codec_steps", "codec_batch", "clips", "dit_steps", "dit_batch"):
            value = getattr(self, name)
            require(value >= 1, f"recipe.{name}", value, "at least 1")
        fits = 2 <= self.short_chunks <= self.chunks
        require(fits, "recipe.short_chunks", self.short_chunks, f"2 to {self.chunks}")
        require(0 <= self.ema < 1, "recipe.ema", self.ema, "from 0 to less than 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """When a stage ends: after so many steps, or after so many minutes of its own work."""

    steps: int
    minutes: float | None = None

    def progress(self, step: int, elapsed_s: float) -> float:
        """From 0 at the start to 1 at the end; decides the learning rate."""
        if self.minutes is not None:
            return min(1.0, elapsed_s / (60 * self.minutes))
        return min(1.0, step / self.steps)


def learning_rate_factor(progress: float, warm_up: float = 0.02, level: float = 0.5) -> float:
    """Rise, stay, then fall as a cosine to nearly nothing."""
    if progress < warm_up:
        return max(progress / warm_up, 0.02)
    if progress < level:
        return 1.0
    fall = (progress - level) / (1 - level)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(fall, 1.0)))
