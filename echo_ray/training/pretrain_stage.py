"""Stage `pretrain`: transformer, memory and text encoder learn flow matching over whole clips.

Chunk by chunk one pass runs over [clean, noisy, noisy] copies of the batch. The clean copy's keys
and values, at t = 0, become the cache and, when they leave the window, the memory, gradients and
all; the noisy copies give the loss. Noise levels are mostly those that the sampler visits.

Shapes: B clips, K chunks, F frames of a chunk, C channels, H W latents, P words.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from echo_ray.config import require
from echo_ray.model.dit import PromptKV
from echo_ray.model.sampler import Schedule
from echo_ray.preset import Preset
from echo_ray.training.bank import Bank, Batch, take
from echo_ray.training.context import (
    draw_repeats,
    erase_objects,
    find_returns,
    latent_weight,
    with_noise,
)
from echo_ray.training.fast import dit_forward
from echo_ray.training.loop import StepRandom
from echo_ray.training.recipe import PretrainRecipe
from echo_ray.training.unroll import Unrolled
from echo_ray.training.video_model import chunk_prompt
from echo_ray.training.video_stage import Materials, VideoStage

NOISY = 2
CONTINUOUS_SHARE = 0.2
"""Share of noise levels drawn from the whole range instead of the sampler's own."""


class PretrainStage(VideoStage):
    """Trains the video model on true pasts; keeps an average of its weights."""

    name = "pretrain"

    def __init__(self, preset: Preset, recipe: PretrainRecipe, materials: Materials) -> None:
        super().__init__(preset, recipe, materials)
        self.section = section = recipe.pretrain
        held = materials.bank.ids_SKL.shape[1]
        fits = section.short_chunks <= held
        require(fits, "pretrain.short_chunks", section.short_chunks, f"at most {held}")
        self.sigmas = Schedule(preset.sampler).sigmas

    def train_step(self, random: StepRandom, progress: float) -> dict[str, float]:
        section = self.section
        chunks = self.bank.ids_SKL.shape[1]
        if progress < section.short_share:
            chunks = section.short_chunks
        single = progress < section.single_object_share
        picked = pick_clips(self.bank, section.batch, random, single=single)
        batch = take(self.bank, picked, range(chunks), self.frames, self.device)
        with self.autocast():
            loss = self.clip_loss(batch, random)
        self.update(loss)
        return {"loss": float(loss.detach())}

    def clip_loss(self, clips: Batch, random: StepRandom) -> Tensor:
        """Weighted squared error of the predicted flow over all chunks and noisy copies."""
        model, section = self.model, self.section
        batch, chunks = clips.ids_BKL.shape[:2]
        prompts = model.prompts(clips.ids_BKL)
        unrolled = self._cache(batch, random)
        again = 1 + (section.return_weight - 1) * find_returns(clips.hidden_BK).float()
        rebuilds = random.data.random() < section.rebuild_share
        rebuild_at = int(random.data.integers(2, chunks)) if rebuilds and chunks > 2 else -1
        latents = clips.latents_BFChw
        context = self.context(latents, chunks, random).chunk(chunks, dim=1)
        losses = []
        for k, x0 in enumerate(latents.chunk(chunks, dim=1)):
            prompt = chunk_prompt(prompts, batch, chunks, k)
            if k == rebuild_at:
                self._rebuild(unrolled, torch.cat(context[:k], dim=1), prompt)
            self._evict(unrolled, clips.hidden_BK, k, random)
            past, own = unrolled.view()
            sigma = self._levels(random, batch)[:, None, None, None, None]
            noise = torch.randn(NOISY, *x0.shape, generator=random.noise).flatten(0, 1)
            noise = noise.to(self.device)
            clean = x0.repeat(NOISY, 1, 1, 1, 1)
            x = torch.cat([context[k], (1 - sigma) * clean + sigma * noise])
            t = torch.cat([torch.zeros(batch, device=self.device), 1000 * sigma.flatten()])
            time = model.dit.condition(t[:, None].expand(-1, x0.shape[1]))
            flow, written = dit_forward(
                model.dit, x, time, prompt, past, own, NOISY + 1, self.block
            )
            error = (flow[batch:].float() - (noise - clean)).square().mean(dim=2)
            weight = latent_weight(x0, section.object_weight) * again[:, k, None, None, None]
            weight = weight.repeat(NOISY, 1, 1, 1)
            loss = (error * weight).sum() / weight.sum()
            losses.append(loss * (section.first_chunk_weight if k == 0 else 1.0))
            unrolled.keep([(key[:batch], value[:batch]) for key, value in written])
        return torch.stack(losses).sum() / (chunks - 1 + section.first_chunk_weight)

    def _cache(self, batch: int, random: StepRandom) -> Unrolled:
        """An empty cache, sometimes without a tier, so that every cache policy is served."""
        section = self.section
        memory = self.model.memory if random.data.random() >= section.hide_memory else None
        sink_seen = memory is not None or random.data.random() >= section.hide_sink
        return Unrolled(self.preset, memory, batch, self.device, sink_seen=sink_seen)

    def context(self, latents_BFCHW: Tensor, chunks: int, random: StepRandom) -> Tensor:
        """Clean latents with the errors that generated ones have: lost objects, and noise."""
        erased = erase_objects(latents_BFCHW, self.section.lost_objects, chunks, random)
        return with_noise(erased, self.section.context_noise, random)

    def _evict(self, unrolled: Unrolled, hidden_BK: Tensor, k: int, random: StepRandom) -> None:
        evicted = unrolled.leave()
        if evicted is not None:
            again = draw_repeats(self.section.fast_forward, random)
            unrolled.remember(evicted, again, hidden_BK[:, k - unrolled.local_chunks])

    def _levels(self, random: StepRandom, batch: int) -> Tensor:
        """Noise levels of the copies: high ones for the first, low ones for the second."""
        half = (len(self.sigmas) + 1) // 2
        parts = (self.sigmas[:half], self.sigmas[half:] or self.sigmas)
        picked = np.concatenate([random.data.choice(part, batch) for part in parts])
        u = random.data.random(NOISY * batch)
        shift = self.preset.sampler.shift
        anywhere = shift * u / (1 + (shift - 1) * u)
        free = random.data.random(NOISY * batch) < CONTINUOUS_SHARE
        return torch.from_numpy(np.where(free, anywhere, picked)).float().to(self.device)

    def _rebuild(self, unrolled: Unrolled, context_BFCHW: Tensor, prompt: PromptKV) -> None:
        """Recompute the local window in one pass under the chunk's prompt, as a switch does."""
        frames = len(unrolled.local) * unrolled.frames
        past, own = unrolled.rebuild_view()
        batch = context_BFCHW.shape[0]
        time = self.model.dit.condition(torch.zeros(batch, frames, device=self.device))
        _, written = dit_forward(
            self.model.dit, context_BFCHW[:, -frames:], time, prompt, past, own, 1
        )
        unrolled.replace_local(written)


def pick_clips(bank: Bank, batch: int, random: StepRandom, *, single: bool) -> Tensor:
    """Which clips make up the batch; `single`: of those with at most one object, if any."""
    allowed = torch.nonzero(bank.objects_S <= 1).flatten() if single else None
    if allowed is None or not len(allowed):
        return torch.from_numpy(random.data.integers(len(bank.ids_SKL), size=batch))
    return allowed[torch.from_numpy(random.data.integers(len(allowed), size=batch))]
