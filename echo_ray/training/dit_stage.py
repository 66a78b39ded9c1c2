"""Stage 1: transformer, memory and text encoder learn flow matching over whole clips.

Chunk by chunk one pass runs over [clean, noisy, noisy] copies of the batch. The clean copy's keys
and values, at t = 0, become the cache and, when they leave the window, the memory, gradients and
all; the noisy copies give the loss. Noise levels are mostly those that the sampler visits.

Shapes: B clips, K chunks, F frames of a chunk, C channels, H W latents, P words.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from echo_ray.model.dit import DiT, PromptKV
from echo_ray.model.group_codec import GroupCodec
from echo_ray.model.memory import MemoryEncoder
from echo_ray.model.sampler import Schedule
from echo_ray.preset import Preset
from echo_ray.training.bank import Bank
from echo_ray.training.export import write_weights
from echo_ray.training.fast import block_forward, dit_forward
from echo_ray.training.loop import StepRandom
from echo_ray.training.recipe import Recipe
from echo_ray.training.sampling import sample_sheet
from echo_ray.training.trainable import new_text
from echo_ray.training.unroll import Unrolled
from echo_ray.weights.folder import WeightsFolder
from echo_ray.weights.modules import load_modules

NOISY = 2
CONTINUOUS_SHARE = 0.2
"""Share of noise levels drawn from the whole range instead of the sampler's own."""
OBJECT_DISTANCE = 0.5
"""Mean distance per channel, in standard deviations, beyond which a latent shows an object."""


class VideoModel(nn.Module):
    """The three trained modules under the prefixes of the weights file."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        dit = preset.dit
        self.dit = DiT(dit)
        self.text = new_text(preset)
        self.memory = MemoryEncoder(dit, preset.cache.memory) if preset.cache.memory else None
        nn.init.zeros_(self.dit.head.head.weight)


class DitStage:
    """Trains the video model from a bank of latents; keeps an average of its weights."""

    name = "dit"

    def __init__(
        self, preset: Preset, recipe: Recipe, bank: Bank, codec: GroupCodec, compiled: bool
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.preset, self.recipe, self.bank, self.codec = preset, recipe, bank, codec
        self.model = VideoModel(preset)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.averaged_steps = 0
        self.sigmas = Schedule(preset.sampler).sigmas
        self.block = torch.compile(block_forward, dynamic=False) if compiled else block_forward
        matrices, rest = split_parameters(self.model)
        self._optimizers = (
            torch.optim.Muon(
                matrices, lr=recipe.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        )

    def train_step(self, random: StepRandom, progress: float) -> float:
        r = self.recipe
        chunks = r.short_chunks if progress < r.short_share else r.chunks
        picked = torch.from_numpy(random.data.integers(len(self.bank.ids_SKL), size=r.dit_batch))
        frames = chunks * self.preset.cache.frames_per_chunk
        latents = self.bank.latents_SFChw[picked, :frames].float()
        ids = self.bank.ids_SKL[picked, :chunks].long()
        with torch.autocast("cpu", torch.bfloat16, enabled=r.bf16):
            loss = self.clip_loss(latents, ids, random)
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()  # type: ignore[no-untyped-call]
        self._update_average()
        return float(loss.detach())

    def clip_loss(self, latents_BFCHW: Tensor, ids_BKP: Tensor, random: StepRandom) -> Tensor:
        """Weighted squared error of the predicted flow over all chunks and noisy copies."""
        model, (batch, chunks) = self.model, ids_BKP.shape[:2]
        prompts = model.dit.encode_prompt(model.text(ids_BKP.flatten(0, 1)))
        hide_memory = random.data.random() < self.recipe.hide_memory
        unrolled = Unrolled(self.preset, None if hide_memory else model.memory, batch)
        rebuilds = random.data.random() < self.recipe.rebuild_share
        rebuild_at = int(random.data.integers(2, chunks)) if rebuilds and chunks > 2 else -1
        context = self._context(latents_BFCHW, random).chunk(chunks, dim=1)
        losses = []
        for k, x0 in enumerate(latents_BFCHW.chunk(chunks, dim=1)):
            prompt = chunk_prompt(prompts, batch, chunks, k)
            if k == rebuild_at:
                self._rebuild(unrolled, torch.cat(context[:k], dim=1), prompt)
            unrolled.evict()
            past, own = unrolled.view()
            sigma = self._levels(random, batch)[:, None, None, None, None]
            noise = torch.randn(NOISY, *x0.shape, generator=random.noise).flatten(0, 1)
            clean = x0.repeat(NOISY, 1, 1, 1, 1)
            x = torch.cat([context[k], (1 - sigma) * clean + sigma * noise])
            t = torch.cat([torch.zeros(batch), 1000 * sigma.flatten()])[:, None]
            time = model.dit.condition(t.expand(-1, x0.shape[1]))
            flow, written = dit_forward(
                model.dit, x, time, prompt, past, own, NOISY + 1, self.block
            )
            error = (flow[batch:].float() - (noise - clean)).square().mean(dim=2)
            weight = self._weight(x0).repeat(NOISY, 1, 1, 1)
            loss = (error * weight).sum() / weight.sum()
            losses.append(loss * (self.recipe.first_chunk_weight if k == 0 else 1.0))
            unrolled.keep([(key[:batch], value[:batch]) for key, value in written])
        return torch.stack(losses).sum() / (chunks - 1 + self.recipe.first_chunk_weight)

    def _weight(self, x0_BFCHW: Tensor) -> Tensor:
        """Weight [B, F, H, W] of each latent."""
        objects, _ = find_objects(x0_BFCHW)
        return 1 + (self.recipe.object_weight - 1) * objects.float()

    def _context(self, latents_BFCHW: Tensor, random: StepRandom) -> Tensor:
        """Clean latents with a little noise on half of the clips, as generated ones have errors."""
        latents_BFCHW = self._erase(latents_BFCHW, random)
        batch = latents_BFCHW.shape[0]
        size = random.data.uniform(0, self.recipe.context_noise, batch)
        size *= random.data.random(batch) < 0.5
        scale = torch.from_numpy(size).float()[:, None, None, None, None]
        noise = torch.randn(latents_BFCHW.shape, generator=random.noise)
        return latents_BFCHW + scale * noise

    def _erase(self, latents_BFCHW: Tensor, random: StepRandom) -> Tensor:
        """Replace objects by background, half or all of them, in random chunks of some clips."""
        batch, frames, _, height, width = latents_BFCHW.shape
        chunks = frames // self.preset.cache.frames_per_chunk
        rate = (random.data.random((batch, 1)) < self.recipe.lost_objects) * (
            random.data.random((batch, chunks)) < 0.5
        )
        rate = rate * random.data.choice((0.5, 1.0), (batch, chunks))
        rate_BF = torch.from_numpy(rate).float().repeat_interleave(frames // chunks, dim=1)
        hit = torch.rand(batch, frames, height, width, generator=random.noise)
        objects, background = find_objects(latents_BFCHW)
        erased = objects & (hit < rate_BF[..., None, None])
        return torch.where(erased[:, :, None], background, latents_BFCHW)

    def _levels(self, random: StepRandom, batch: int) -> Tensor:
        """Noise levels of the copies: high ones for the first, low ones for the second."""
        half = (len(self.sigmas) + 1) // 2
        parts = (self.sigmas[:half], self.sigmas[half:] or self.sigmas)
        picked = np.concatenate([random.data.choice(part, batch) for part in parts])
        u = random.data.random(NOISY * batch)
        shift = self.preset.sampler.shift
        anywhere = shift * u / (1 + (shift - 1) * u)
        free = random.data.random(NOISY * batch) < CONTINUOUS_SHARE
        return torch.from_numpy(np.where(free, anywhere, picked)).float()

    def _rebuild(self, unrolled: Unrolled, context_BFCHW: Tensor, prompt: PromptKV) -> None:
        """Recompute the local window in one pass under the chunk's prompt, as a switch does."""
        frames = len(unrolled.local) * unrolled.frames
        past, own = unrolled.rebuild_view()
        batch = context_BFCHW.shape[0]
        time = self.model.dit.condition(torch.zeros(batch, frames))
        _, written = dit_forward(
            self.model.dit, context_BFCHW[:, -frames:], time, prompt, past, own, 1
        )
        unrolled.replace_local(written)

    @torch.no_grad()
    def _update_average(self) -> None:
        self.averaged_steps += 1
        decay = min(self.recipe.ema, self.averaged_steps / (self.averaged_steps + 10))
        torch._foreach_lerp_(
            list(self.average.parameters()), list(self.model.parameters()), 1 - decay
        )

    def optimizers(self) -> Iterable[torch.optim.Optimizer]:
        return self._optimizers

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "averaged_steps": self.averaged_steps,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.averaged_steps = state["averaged_steps"]

    def at_checkpoint(self, out: Path, step: int) -> None:
        write_weights(self.preset, self.average, self.codec, out)
        modules = load_modules(self.preset, WeightsFolder.open(out), torch.device("cpu"))
        sample_sheet(self.preset, modules, out / f"samples_{step:06d}.png")


def find_objects(latents_BFCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Where objects are [B, F, H, W]: far from the frame's median; and that median."""
    background = latents_BFCHW.flatten(3).median(dim=-1).values[..., None, None]
    differs = (latents_BFCHW - background).abs().mean(dim=2)
    return differs > OBJECT_DISTANCE, background


def chunk_prompt(prompts: PromptKV, batch: int, chunks: int, k: int) -> PromptKV:
    """Chunk k's part of prompts encoded for all chunks of all clips at once."""
    return PromptKV(
        tuple(
            (
                key.view(batch, chunks, *key.shape[1:])[:, k],
                value.view(batch, chunks, *value.shape[1:])[:, k],
            )
            for key, value in prompts.layers
        )
    )


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices between hidden layers, and everything else: embeddings, norms, biases, heads."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        outer = any(part in name for part in ("words", "positions", "head.", "modulation"))
        is_matrix = parameter.ndim == 2 and not outer
        (matrices if is_matrix else rest).append(parameter)
    return matrices, rest
