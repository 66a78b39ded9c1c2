"""Distribution matching distillation: the student follows the difference of two scores.

The teacher's score of what the student makes is the real one, frozen; the critic begins as a copy
of the teacher and learns the score of what the student makes now. Their difference is the
gradient of the student's samples. No adversary, no reconstruction, no loss on the memory.

Shapes: B clips, K chunks, F frames of the whole clip, C channels, H W latents, P words.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from echo_ray.training.fast import BlockForward
from echo_ray.training.loop import StepRandom
from echo_ray.training.lora import add_lora
from echo_ray.training.optimise import Updater
from echo_ray.training.recipe import DmdSection, LoraSection
from echo_ray.training.teacher import clip_levels, whole_clip_flow
from echo_ray.training.video_model import VideoModel


class Dmd:
    """Both scores, and the critic's optimiser."""

    def __init__(
        self,
        section: DmdSection,
        teacher: VideoModel,
        shift: float,
        lora: LoraSection | None,
        block: BlockForward,
    ) -> None:
        self.section, self.shift, self.block = section, shift, block
        self.critic = copy.deepcopy(teacher).requires_grad_(requires_grad=True)
        if lora is not None:
            self.critic.text.requires_grad_(requires_grad=False)
            add_lora(self.critic.dit, lora)
        self.teacher = teacher.requires_grad_(requires_grad=False)
        self.updater = Updater(self.critic, section.critic)

    def student_turn(self, step: int) -> bool:
        """Whether the student learns in this step; the critic does in every one."""
        return step % self.section.ratio == 0

    def student_loss(self, x: Tensor, ids_BKP: Tensor, fresh: int, random: StepRandom) -> Tensor:
        """Half the mean square of x towards x - g, over the last `fresh` frames.

        g = (fake - real) / mean |x - real|: both are clean estimates of x at one noise level a
        clip. The value is that of the gradient, so it says how far apart the scores are.
        """
        with torch.no_grad():
            noisy, sigma, _ = self._noised(x, random)
            fake = self._clean(self.critic, noisy, sigma, ids_BKP)
            real = self._clean(self.teacher, noisy, sigma, ids_BKP)
            if self.section.guidance:
                blind = self._clean(self.teacher, noisy, sigma, torch.zeros_like(ids_BKP))
                real = real + self.section.guidance * (real - blind)
            scale = (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
            target = x - torch.nan_to_num((fake - real) / scale)
        return 0.5 * (x - target)[:, -fresh:].square().mean()

    def critic_loss(self, x: Tensor, ids_BKP: Tensor, fresh: int, random: StepRandom) -> Tensor:
        """Flow matching on what the student has made."""
        x = x.detach()
        noisy, sigma, noise = self._noised(x, random)
        flow = whole_clip_flow(self.critic, noisy, sigma, ids_BKP, self.block)
        return (flow - (noise - x))[:, -fresh:].square().mean()

    def state(self) -> dict[str, Any]:
        return self.critic.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        self.critic.load_state_dict(state)

    def _noised(self, x: Tensor, random: StepRandom) -> tuple[Tensor, Tensor, Tensor]:
        sigma = clip_levels(len(x), self.shift, random).clamp(self.section.low, self.section.high)
        noise = torch.randn(x.shape, generator=random.noise).to(x.device)
        level = sigma.to(x.device)
        wide = level[:, None, None, None, None]
        return (1 - wide) * x + wide * noise, level, noise

    def _clean(self, model: VideoModel, noisy: Tensor, sigma: Tensor, ids_BKP: Tensor) -> Tensor:
        flow = whole_clip_flow(model, noisy, sigma, ids_BKP, self.block)
        return noisy - sigma[:, None, None, None, None] * flow
