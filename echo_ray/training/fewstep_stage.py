"""Stage `fewstep`: the student learns on rollouts of its own, at the steps that serve."""

from __future__ import annotations

import torch

from echo_ray.config import require
from echo_ray.preset import Preset
from echo_ray.training.bank import take
from echo_ray.training.loop import StepRandom
from echo_ray.training.recipe import FewstepRecipe
from echo_ray.training.self_stage import SelfStage
from echo_ray.training.video_stage import Materials


class FewstepStage(SelfStage):
    """One rollout a sample, from the first chunk; the memory's gradient flows through all of it."""

    name = "fewstep"

    def __init__(self, preset: Preset, recipe: FewstepRecipe, materials: Materials) -> None:
        super().__init__(preset, recipe, materials)
        self.chunks = recipe.fewstep.chunks
        held = self.bank.ids_SKL.shape[1]
        rule = f"at most clips.chunks ({held})"
        require(self.chunks <= held, "fewstep.chunks", self.chunks, rule)

    def train_step(self, random: StepRandom, progress: float) -> dict[str, float]:
        batch = self.section.batch
        picked = torch.from_numpy(random.data.integers(len(self.bank.ids_SKL), size=batch))
        clips = take(self.bank, picked, range(self.chunks), self.frames, self.device)
        with self.autocast(), torch.set_grad_enabled(self.learns(random)):
            rolled = self.roll(self.new_rollout(batch, random), clips, random)
        return self.learn([rolled], random)
