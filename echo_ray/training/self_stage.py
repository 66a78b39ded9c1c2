"""What the two stages share in which the student makes its own past: rollout and objectives.

`regression`: every chunk begins from the truth at some noise level, the student denoises it by its
own sampler's steps, and the step that is trained is drawn towards the true latents. Where it began
from little noise its result, not the truth, is what later chunks see. So the past has the student's
own errors and yet fits the clip.

`dmd`: every chunk begins from noise; one step of the sampler is trained for all chunks of a
rollout, and what it makes is judged as a whole clip by the two scores of `dmd.py`.

Shapes: B clips, K chunks, F frames of a chunk, C channels, H W latents, P words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from echo_ray.errors import ConfigError
from echo_ray.preset import Preset
from echo_ray.training.bank import Batch
from echo_ray.training.context import draw_repeats, latent_weight, with_noise
from echo_ray.training.dmd import Dmd
from echo_ray.training.loop import StepRandom
from echo_ray.training.recipe import RolloutRecipe
from echo_ray.training.rollout import Chunk, Lead, Rollout
from echo_ray.training.video_model import chunk_prompt
from echo_ray.training.video_stage import Materials, VideoStage


@dataclass(frozen=True, slots=True)
class Rolled:
    """A clip as the student made it."""

    latents_BFCHW: Tensor
    """With what was made before and is only looked at in front."""
    ids_BKP: Tensor
    fresh: int
    """Frames, the last ones, that are new."""
    loss: Tensor | None
    """Of the regression; None if the scores have yet to judge the clip."""


class SelfStage(VideoStage):
    """Learns from rollouts over the cache that serves."""

    def __init__(self, preset: Preset, recipe: RolloutRecipe, materials: Materials) -> None:
        super().__init__(preset, recipe, materials)
        self.section = recipe.rollout
        self.dmd: Dmd | None = None
        if recipe.dmd is not None:
            if materials.teacher is None:
                raise ConfigError("dmd.teacher: no teacher was loaded", param="dmd.teacher")
            self.dmd = Dmd(
                recipe.dmd, materials.teacher, preset.sampler.shift, recipe.lora, self.block
            )

    def new_rollout(self, batch: int, random: StepRandom) -> Rollout:
        see_memory = random.data.random() >= self.section.hide_memory
        return Rollout(
            self.preset, self.model, batch, self.device,
            block=self.block,
            see_memory=see_memory,
            context_gradient=self.section.context_gradient,
        )  # fmt: skip

    def roll(self, rollout: Rollout, clips: Batch, random: StepRandom) -> Rolled:
        """Make the next chunks of a rollout under the clips' captions."""
        batch, chunks = clips.ids_BKL.shape[:2]
        prompts = self.model.prompts(clips.ids_BKL)
        exit_step = int(random.data.integers(len(rollout.schedule)))
        made: list[Tensor] = []
        losses: list[Tensor] = []
        weights: list[float] = []
        for k, truth in enumerate(clips.latents_BFChw.chunk(chunks, dim=1)):
            prompt = chunk_prompt(prompts, batch, chunks, k)
            chunk = Chunk(prompt, clips.ids_BKL[:, k], clips.hidden_BK[:, k])
            first = rollout.next_chunk == 0
            aligned_B: Tensor | None = None
            if self.dmd is None:
                clean, loss, aligned_B = self._towards(rollout, chunk, truth, random)
                losses.append(loss)
                weights.append(self.section.first_chunk_weight if first else 1.0)
            else:
                repeats = draw_repeats(self.section.fast_forward, random)
                draw = self._draws(rollout, truth, random)
                clean = rollout.denoise(chunk, draw, exit_step, fast_forward=repeats)
            made.append(clean)
            rollout.absorb(chunk, self._context(clean.detach(), truth, aligned_B, random))
        total = None
        if losses:
            total = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
        latents = torch.cat(made, dim=1)
        return Rolled(latents, clips.ids_BKL, latents.shape[1], total)  # type: ignore[arg-type]

    def learn(self, rolled: Sequence[Rolled], random: StepRandom) -> dict[str, float]:
        """Follow the objective over some clips once; with scores, the critic after the student."""
        if self.dmd is None:
            loss = torch.stack([clip.loss for clip in rolled if clip.loss is not None]).mean()
            self.update(loss)
            return {"loss": float(loss.detach())}
        losses: dict[str, float] = {}
        if self.dmd.student_turn(random.step):
            with self.autocast():
                judged = [
                    self.dmd.student_loss(c.latents_BFCHW, c.ids_BKP, c.fresh, random)
                    for c in rolled
                ]
            loss = torch.stack(judged).mean()
            self.update(loss)
            losses["student"] = float(loss.detach())
        with self.autocast():
            judged = [
                self.dmd.critic_loss(c.latents_BFCHW, c.ids_BKP, c.fresh, random) for c in rolled
            ]
        loss = torch.stack(judged).mean()
        self.dmd.updater.step(loss)
        return losses | {"critic": float(loss.detach())}

    def learns(self, random: StepRandom) -> bool:
        """Whether this step's rollout needs a gradient."""
        return self.dmd is None or self.dmd.student_turn(random.step)

    def optimizers(self) -> Iterable[torch.optim.Optimizer]:
        critic = self.dmd.updater.optimizers if self.dmd else []
        return [*self.updater.optimizers, *critic]

    def state(self) -> dict[str, Any]:
        return super().state() | {"critic": self.dmd.state() if self.dmd else None}

    def restore(self, state: dict[str, Any]) -> None:
        if (self.dmd is None) != (state["critic"] is None):
            raise ValueError(
                "it was made with another rollout.objective; give this recipe a run.folder of its "
                "own"
            )
        super().restore(state)
        if self.dmd is not None:
            self.dmd.restore(state["critic"])

    def _towards(
        self, rollout: Rollout, chunk: Chunk, truth: Tensor, random: StepRandom
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The student's chunk, its distance from the truth in units of the flow, and in which rows
        it began from so little noise that it fits the clip."""
        section, batch = self.section, truth.shape[0]
        exit_step = int(random.data.integers(len(rollout.schedule)))
        most = min(section.lead_steps, exit_step)
        starts = exit_step - random.data.integers(0, most + 1, batch)
        lead = Lead(truth, torch.from_numpy(starts).to(self.device), int(starts.min()))
        draw = self._draws(rollout, truth, random)
        repeats = draw_repeats(section.fast_forward, random)
        clean = rollout.denoise(chunk, draw, exit_step, lead=lead, fast_forward=repeats)
        error = (clean - truth).square().mean(dim=2) / rollout.schedule.sigmas[exit_step] ** 2
        weight = latent_weight(truth, section.object_weight)
        aligned_B = lead.first_step_B >= section.aligned_from
        return clean, (error * weight).sum() / weight.sum(), aligned_B

    def _draws(self, rollout: Rollout, truth: Tensor, random: StepRandom) -> partial[Tensor]:
        """All the noise that a chunk's sampler can ask for."""
        size = (len(rollout.schedule), *truth.shape)
        noise = torch.randn(size, generator=random.noise).to(self.device)
        return partial(torch.select, noise, 0)

    def _context(
        self, clean: Tensor, truth: Tensor, aligned_B: Tensor | None, random: StepRandom
    ) -> Tensor:
        """What later chunks take for this one."""
        if aligned_B is not None:
            own = torch.from_numpy(random.data.random(len(clean)) < self.section.own_share)
            own_B = own.to(self.device) & aligned_B
            clean = torch.where(own_B[:, None, None, None, None], clean, truth)
        return with_noise(clean, self.section.context_noise, random)
