"""A model that sees a whole clip at once, and the stage that trains one.

It is the same transformer without cache and memory: all frames attend to all, every frame at its
own position, every chunk to its own caption, one noise level a clip. What it has learned is the
real score that distribution matching follows; a trainable copy is the fake one.

Shapes: B clips, K chunks, F frames of the whole clip, C channels, H W latents, P words.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from echo_ray.config import require
from echo_ray.model.rope import FrameRope
from echo_ray.model.sampler import sigma_table
from echo_ray.preset import Preset
from echo_ray.training.bank import take
from echo_ray.training.context import latent_weight
from echo_ray.training.export import write_weights
from echo_ray.training.fast import BlockForward, block_forward, dit_forward
from echo_ray.training.loop import StepRandom
from echo_ray.training.pictures import contact_sheet
from echo_ray.training.recipe import TeacherRecipe
from echo_ray.training.video_model import VideoModel
from echo_ray.training.video_stage import Materials, VideoStage

SHEET_CLIPS, SHEET_STEPS = 4, 16


def whole_clip_flow(
    model: VideoModel,
    x_BFCHW: Tensor,
    sigma_B: Tensor,
    ids_BKP: Tensor,
    block: BlockForward = block_forward,
) -> Tensor:
    """Flow, in float32, of clips whose frames see each other and each its chunk's caption."""
    dit, frames = model.dit, x_BFCHW.shape[1]
    shape = dit.shape
    rope = FrameRope(shape.grid_height, shape.grid_width, shape.head_dim, str(x_BFCHW.device))
    table = rope.table(tuple(range(frames)))
    own = (table.real.float(), table.imag.float())
    time = dit.condition((1000 * sigma_B)[:, None].expand(-1, frames))
    prompts = model.prompts(ids_BKP)
    flow, _ = dit_forward(dit, x_BFCHW, time, prompts, None, own, 1, block, ids_BKP.shape[1])
    return flow.float()


def clip_levels(batch: int, shift: float, random: StepRandom) -> Tensor:
    """One noise level a clip: a timestep drawn evenly, then shifted as the sampler's are."""
    u = torch.from_numpy(random.data.random(batch)).float()
    return shift * u / (1 + (shift - 1) * u)


def without_memory(preset: Preset) -> Preset:
    """The preset whose weights a teacher has."""
    return replace(preset, cache=replace(preset.cache, memory=None))


class TeacherStage(VideoStage):
    """Flow matching over windows of clips, wherever they begin."""

    name = "teacher"

    def __init__(self, preset: Preset, recipe: TeacherRecipe, materials: Materials) -> None:
        super().__init__(without_memory(preset), recipe, materials)
        self.section = recipe.teacher
        held = self.bank.ids_SKL.shape[1]
        fits = self.section.chunks <= held
        require(fits, "teacher.chunks", self.section.chunks, f"at most clips.chunks ({held})")

    def train_step(self, random: StepRandom, progress: float) -> dict[str, float]:
        section = self.section
        clips, held = self.bank.ids_SKL.shape[:2]
        picked = torch.from_numpy(random.data.integers(clips, size=section.batch))
        start = int(random.data.integers(0, held - section.chunks + 1))
        window = range(start, start + section.chunks)
        batch = take(self.bank, picked, window, self.frames, self.device)
        kept = torch.from_numpy(random.data.random(section.batch) >= section.drop_caption)
        ids = batch.ids_BKL * kept[:, None, None].to(self.device)
        x0 = batch.latents_BFChw
        sigma = clip_levels(section.batch, self.preset.sampler.shift, random).to(self.device)
        level = sigma[:, None, None, None, None]
        noise = torch.randn(x0.shape, generator=random.noise).to(self.device)
        with self.autocast():
            x = (1 - level) * x0 + level * noise
            flow = whole_clip_flow(self.model, x, sigma, ids, self.block)
        error = (flow - (noise - x0)).square().mean(dim=2)
        weight = latent_weight(x0, section.object_weight)
        loss = (error * weight).sum() / weight.sum()
        self.update(loss)
        return {"loss": float(loss.detach())}

    def at_checkpoint(self, out: Path, step: int) -> None:
        write_weights(self.preset, self.average.model, self.codec, out, self.start)
        if self.run.sheet_chunks:
            contact_sheet(self._samples(), out / f"sheet_{step:06d}.png")

    @torch.no_grad()
    def _samples(self) -> Tensor:
        """Clips made in many Euler steps for the captions of the bank's first clips."""
        picked = torch.arange(min(SHEET_CLIPS, len(self.bank.ids_SKL)))
        batch = take(self.bank, picked, range(self.section.chunks), self.frames, self.device)
        source = torch.Generator().manual_seed(0)
        x = torch.randn(batch.latents_BFChw.shape, generator=source).to(self.device)
        table = sigma_table(self.preset.sampler.shift)
        levels = [float(s) for s in table[:: len(table) // SHEET_STEPS]]
        for sigma, after in zip(levels, [*levels[1:], 0.0], strict=True):
            at = torch.full((len(picked),), sigma, device=self.device)
            flow = whole_clip_flow(self.average.model, x, at, batch.ids_BKL)
            x = x + (after - sigma) * flow
        pixels, _ = self.codec.decode(x, self.codec.initial_state())
        return pixels[:, 2 :: self.preset.frames_per_chunk // 2]
