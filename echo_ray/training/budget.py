"""How long a stage trains, and how fast it learns at which part of that."""

from __future__ import annotations

import math
from dataclasses import dataclass


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


def learning_rate_factor(
    progress: float, schedule: str = "cosine", warm_up: float = 0.02, level: float = 0.5
) -> float:
    """Rise, stay, then fall as a cosine to nearly nothing; or stay for good."""
    if progress < warm_up:
        return max(progress / warm_up, 0.02)
    if progress < level or schedule == "constant":
        return 1.0
    fall = (progress - level) / (1 - level)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(fall, 1.0)))
