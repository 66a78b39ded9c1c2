"""A batch of streams that the model makes itself in training, just as the engine serves them.

Same cache, same steps, same order: the first forward of a chunk sees the memory as it was before
the frames that leave now, the later ones after; the context pass on the result writes the cache; a
changed caption recaches the window, a point rebuilds it. A test holds it equal to the engine.

Gradients, as published: the sampler's steps before the one that is trained, the context pass,
recaches and rebuilds have none, so keys and values that are kept, and those that the memory
reads when they leave, are constants. The memory's own updates and read-outs always have one, so its
gradient flows through all chunks since the last `detach`.

Shapes: B streams, F frames of a chunk, C channels, H W latents, P words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from echo_ray.errors import ConfigError
from echo_ray.model.dit import PromptKV
from echo_ray.model.sampler import Schedule, clean_from_flow, noise_from_flow, renoise
from echo_ray.preset import Preset
from echo_ray.training.fast import BlockForward, Pair, Past, block_forward, dit_forward
from echo_ray.training.unroll import ChunkKV, Unrolled
from echo_ray.training.video_model import VideoModel

Draw = Callable[[int], Tensor]
"""Denoising step -> Gaussian noise [B, F, C, H, W]; step 0 is the initial noise."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is known of the chunk to come."""

    prompt: PromptKV
    ids_BP: Tensor
    """The words behind `prompt`."""
    hidden_B: Tensor
    """Rows where nothing but background is to be seen."""


@dataclass(frozen=True, slots=True)
class Lead:
    """Rows that begin later than at pure noise: from the truth, noised to a step's level."""

    truth: Tensor
    first_step_B: Tensor
    earliest: int
    """The least of `first_step_B`, as a host number."""


@contextmanager
def gradient(on: bool) -> Iterator[None]:
    """Gradients on, if they are at all, or off; autocast must not carry weights across."""
    torch.clear_autocast_cache()
    with torch.set_grad_enabled(on and torch.is_grad_enabled()):
        yield
    torch.clear_autocast_cache()


class Rollout:
    """One batch of streams, chunk by chunk: `denoise`, then `absorb`."""

    def __init__(
        self,
        preset: Preset,
        model: VideoModel,
        batch: int,
        device: torch.device,
        *,
        block: BlockForward = block_forward,
        see_memory: bool = True,
        context_gradient: bool = False,
    ) -> None:
        if not preset.cache.global_sink:
            raise ConfigError(
                "cache.global_sink: false is not trained here: the sink would change at a switch; "
                "set it to true",
                param="cache.global_sink",
            )
        self.preset, self.model, self.device, self.block = preset, model, device, block
        self.schedule = Schedule(preset.sampler)
        self.context_gradient = context_gradient
        self.cache = Unrolled(preset, model.memory if see_memory else None, batch, device)
        dit = preset.dit
        self.history = torch.zeros(
            batch, 0, dit.in_channels, dit.latent_height, dit.latent_width, device=device
        )
        """The latest latents that became context, as many as the window without sink has."""
        self.sink = self.history
        self.sink_ids: Tensor | None = None
        self.last_ids: Tensor | None = None
        self.hidden: list[Tensor] = []
        """Of each local chunk, the rows where nothing but background is to be seen."""

    @property
    def next_chunk(self) -> int:
        return self.cache.chunk

    def denoise(
        self,
        chunk: Chunk,
        draw: Draw,
        exit_step: int,
        *,
        lead: Lead | None = None,
        fast_forward: int = 0,
    ) -> Tensor:
        """The student's clean latents of the next chunk at `exit_step`; `absorb` has to follow.

        Only that step's pass has a gradient. `fast_forward`: how often the memory update is
        repeated in rows where the leaving chunk was empty.
        """
        self._recache_changed(chunk)
        leaving = self.cache.leave()
        empty = self.hidden.pop(0) if leaving is not None else None
        past, own = self.cache.view()
        clean = x = draw(0)
        for step in range(lead.earliest if lead else 0, exit_step + 1):
            if step > 0 and leaving is not None:
                # Frames that left are visible as memory from the second forward on.
                self.cache.remember(leaving, fast_forward, empty)
                leaving = None
                past, own = self.cache.view()
            sigma = self.schedule.sigmas[step]
            if lead is not None:
                starts = (lead.first_step_B == step)[:, None, None, None, None]
                x = torch.where(starts, renoise(lead.truth, draw(step), sigma), x)
            with gradient(step == exit_step):
                timestep = self.schedule.timesteps[step]
                flow, _ = self._forward(x, timestep, chunk.prompt, past, own)
                clean = clean_from_flow(x, flow.float(), sigma)
            if step < exit_step:
                euler = self.schedule.kind == "euler"
                epsilon = noise_from_flow(x, flow.float(), sigma) if euler else draw(step + 1)
                x = renoise(clean, epsilon, self.schedule.sigmas[step + 1])
        if leaving is not None:
            self.cache.remember(leaving, fast_forward, empty)
        return clean

    def absorb(self, chunk: Chunk, context: Tensor) -> None:
        """Let `context` [B, F, C, H, W] be what the chunk has become, for all that follow."""
        context = context.detach()
        if self.sink_ids is None:
            self.sink_ids, self.sink = chunk.ids_BP, context
        else:
            self.hidden.append(chunk.hidden_B)
        self.last_ids = chunk.ids_BP
        keep = self.preset.cache.history_frames
        self.history = torch.cat([self.history, context], dim=1)[:, -keep:]
        every = self.preset.cache.point_every
        if every and (self.next_chunk + 1) % every == 0:
            self._rebuild(chunk.prompt)
            return
        self.cache.keep(self._context_pass(context, chunk.prompt, *self.cache.view()))

    def detach(self) -> None:
        """Cut the state off from the weights that made it."""
        self.cache.detach()

    def state(self) -> dict[str, Any]:
        """The streams as plain values; only after `detach`."""
        return {
            "cache": self.cache.state(),
            "history": self.history,
            "sink": self.sink,
            "sink_ids": self.sink_ids,
            "last_ids": self.last_ids,
            "hidden": self.hidden,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.cache.restore(state["cache"])
        self.history, self.sink = (state[k].to(self.device) for k in ("history", "sink"))
        self.sink_ids, self.last_ids = (
            None if state[k] is None else state[k].to(self.device) for k in ("sink_ids", "last_ids")
        )
        self.hidden = [rows.to(self.device) for rows in state["hidden"]]

    def _forward(
        self, x: Tensor, timestep: float, prompt: PromptKV, past: Past | None, own: Pair
    ) -> tuple[Tensor, ChunkKV]:
        t_BF = torch.full(x.shape[:2], timestep, device=self.device)
        dit = self.model.dit
        return dit_forward(dit, x, dit.condition(t_BF), prompt, past, own, 1, self.block)

    def _context_pass(
        self, latents: Tensor, prompt: PromptKV, past: Past | None, own: Pair
    ) -> ChunkKV:
        with gradient(self.context_gradient):
            return self._forward(latents, self.schedule.context_noise, prompt, past, own)[1]

    def _rebuild(self, prompt: PromptKV) -> None:
        """At a point: the window anew from latents, sink first, then chunk by chunk."""
        cache, count = self.cache, self.cache.frames
        end = cache.chunk + 1
        local = self.history[:, -min(self.preset.cache.local_frames, (end - 1) * count) :]
        cache.sink, cache.local, cache.chunk = None, [], 0
        with gradient(self.context_gradient):
            sink_prompt = self.model.prompts(self.sink_ids)  # type: ignore[arg-type]
        memory, cache.memory = cache.memory, None
        cache.keep(self._context_pass(self.sink, sink_prompt, *cache.view()))
        cache.memory = memory
        chunks = local.chunk(local.shape[1] // count, dim=1) if end > 1 else ()
        for k, latents in enumerate(chunks):
            cache.chunk = end - len(chunks) + k
            cache.keep(self._context_pass(latents, prompt, *cache.view()))

    def _recache_changed(self, chunk: Chunk) -> None:
        """In rows whose caption is another now, what the engine does at a prompt switch."""
        cache, memory = self.cache, self.preset.cache.memory
        if self.last_ids is None or not cache.local:
            return
        rows = (chunk.ids_BP != self.last_ids).any(dim=1)
        if not bool(rows.any()):
            return
        held = len(cache.local) * cache.frames
        if (cache.chunk - 1) * cache.frames > held:
            written = self._context_pass(
                self.history[:, -held:], chunk.prompt, *cache.rebuild_view()
            )
        else:
            # The sink is still the window's oldest part, and is read anew with the rest.
            latents = torch.cat([self.sink, self.history[:, -held:]], dim=1)
            both = self._context_pass(latents, chunk.prompt, *cache.whole_view())
            written = [(k[:, -self._tokens(held) :], v[:, -self._tokens(held) :]) for k, v in both]
        cache.replace_local(written, rows)
        if memory is not None and memory.recache:
            self._rebuild_memory(rows, written[-1])

    def _rebuild_memory(self, rows_B: Tensor, written: Pair) -> None:
        """The memory from nothing but the recached window, in the rows that have switched.

        Where no row has a memory yet, rows cannot differ in having one: unless all have switched,
        the memory then begins with the frames that leave next.
        """
        cache = self.cache
        if cache.encoder is None or len(cache.local) < cache.local_chunks:
            return
        state = cache.encoder.update(cache.encoder.initial(cache.batch), *written)
        if cache.memory_state is not None:
            state = torch.where(rows_B[:, None, None], state, cache.memory_state)
        elif not bool(rows_B.all()):
            return
        cache.set_memory(state)

    def _tokens(self, frames: int) -> int:
        return frames * self.preset.dit.tokens_per_frame
