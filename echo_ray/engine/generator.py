"""The autoregressive rollout on one device: chunks, prompt switches, consolidation.

The algorithm is the specification's (sections 4 to 8); what is ours is that everything which makes
a stream go on is a `LatentState`, and that the window is rebuilt from its compact part at fixed
points. The generator knows nothing about prompts as text, pixels or services.

Whatever takes several forwards is also there in slices of one forward each (`denoising`,
`absorbing`, `rebuilding`). Between two slices other streams may be worked on; this one's state is
whole only behind the last.

Shapes: B batch, F frames per chunk, C H W latent, P text tokens, M memory tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from echo_ray.engine.arena import Arena, Arenas
from echo_ray.engine.aside import Aside, HostAside, Later
from echo_ray.engine.cache import Window
from echo_ray.engine.forward import Forward
from echo_ray.engine.graphs import Graphs, Recorder
from echo_ray.engine.slices import Slices, whole
from echo_ray.model.dit import DiT, Modulations, PromptKV
from echo_ray.model.memory import MemoryEncoder
from echo_ray.model.policies.choose import choose_policy
from echo_ray.model.policies.policy import CallFrames
from echo_ray.model.sampler import Schedule, clean_from_flow, noise_from_flow, renoise
from echo_ray.preset import CacheShape, SamplerShape

ARENAS_KEPT = 4
"""Free arenas that stay allocated for the next sessions."""

Noise = Callable[[int, int], Tensor]
"""(chunk index, denoising step) -> Gaussian noise [B, F, C, H, W]; step 0 is the initial noise."""


@dataclass(slots=True)
class LatentState:
    """A stream between two chunks. The window is derived; the rest is the compact state."""

    window: Window
    prompt: PromptKV
    sink_prompt: PromptKV
    """What the sink's keys were computed under."""
    query_BMC: Tensor | None
    """The memory's query state; None in a model without memory."""
    has_history: bool
    """Whether the memory was ever updated; before that there is no memory tier."""
    sink_BFCHW: Tensor
    """Clean latents of the sink's frames."""
    sink_first: int
    history_BFCHW: Tensor
    """The latest clean latents, oldest first, as many as a switch, a rebuild or a decoder needs."""
    next_chunk: int


class Generator:
    """Weights and a cache shape; every method takes the state it works on."""

    def __init__(
        self,
        dit: DiT,
        memory: MemoryEncoder | None,
        cache: CacheShape,
        sampler: SamplerShape,
        kept_latents: int = 0,
        *,
        recorder: Recorder | None = None,
        aside: Aside | None = None,
        arenas_kept: int = ARENAS_KEPT,
    ) -> None:
        """`kept_latents`: how many clean latents a decoder wants to be rebuilt from.

        `recorder`: records a chunk's forwards to be replayed; None: every forward runs eagerly.
        `aside`: where the memory is updated; None: where the forwards run.
        """
        self.dit = dit
        self.memory = memory
        self.cache = cache
        self.history_frames = max(cache.history_frames, kept_latents)
        self.policy = choose_policy(cache)
        self.schedule = Schedule(sampler)
        self.arenas = Arenas(self._arena, arenas_kept)
        self._recorder = recorder
        self._aside = aside or HostAside()
        self._modulations: dict[tuple[float, int, int], Modulations] = {}

    @property
    def device(self) -> torch.device:
        return self.dit.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.dit.patch_embedding.weight.dtype

    def start(self, text_BPE: Tensor) -> LatentState:
        """A stream before its first chunk, under prompt embeddings [B, P, text_dim]."""
        shape, batch = self.dit.shape, text_BPE.shape[0]
        nothing = torch.zeros(
            batch, 0, shape.in_channels, shape.latent_height, shape.latent_width,
            device=self.device, dtype=self.dtype,
        )  # fmt: skip
        prompt = self.dit.encode_prompt(text_BPE)
        return LatentState(
            window=Window(shape, self.cache, self.policy, self.arenas.lease(batch)),
            prompt=prompt,
            sink_prompt=prompt,
            query_BMC=self.memory.initial(batch) if self.memory else None,
            has_history=False,
            sink_BFCHW=nothing,
            sink_first=0,
            history_BFCHW=nothing,
            next_chunk=0,
        )

    def close(self, state: LatentState) -> None:
        """Give the state's arena back; the state cannot be used any more. Twice does no harm."""
        if not state.window.closed:
            self.arenas.give_back(state.window.close())

    def generate(self, state: LatentState, noise: Noise) -> Tensor:
        """Denoise the next chunk and let it join the past; returns its clean latents."""
        clean = self.denoise(state, noise)
        self.absorb(state, clean)
        return clean

    def adopt(self, state: LatentState, clean: Tensor) -> None:
        """Let given latents [B, F, C, H, W] take the place of the next chunk's denoising."""
        self.make_room(state)
        self.absorb(state, clean)

    def make_room(self, state: LatentState) -> None:
        """Give the next chunk its slots without denoising it; `absorb` has to follow.

        What leaves the window is remembered, so the chunk's context pass sees the memory that it
        would see after denoising.
        """
        count = self.cache.frames_per_chunk
        update = self._leaving_update(state, count)
        state.window.advance(state.next_chunk * count, count)
        self._remember_leaving(state, update)

    def absorb(self, state: LatentState, clean: Tensor) -> None:
        """Let a denoised chunk join the past and advance to the next one; see `absorbing`."""
        whole(self.absorbing(state, clean))

    def absorbing(self, state: LatentState, clean: Tensor) -> Slices[None]:
        """`absorb` in slices.

        Chunk indices divisible by `point_every` are points: there the rebuild of the whole window
        takes the place of the chunk's context pass.
        """
        first = state.next_chunk * self.cache.frames_per_chunk
        state.next_chunk += 1
        self._remember(state, clean)
        every = self.cache.point_every
        if every and state.next_chunk % every == 0:
            yield from self.rebuilding(state)
        else:
            self._context_pass(state, clean, first, see_memory=state.has_history)

    def switch(self, state: LatentState, text_BPE: Tensor) -> None:
        """Change the prompt before the next chunk and recache the window under it (section 8)."""
        state.prompt = self.dit.encode_prompt(text_BPE)
        end = state.next_chunk * self.cache.frames_per_chunk
        if end == 0:
            state.sink_prompt = state.prompt
            return
        self._recache(state, end)
        if self.memory is None or self.cache.memory is None or not self.cache.memory.recache:
            return
        state.query_BMC = self.memory.initial(state.sink_BFCHW.shape[0])
        state.has_history = False
        if self._rebuilt_memory_fits(state, end):
            sink = self.cache.sink_frames
            self._update_memory(state, *state.window.last_layer(sink, state.window.local_held))

    def rebuild(self, state: LatentState) -> None:
        """Recompute the window from the compact state; see `rebuilding`."""
        whole(self.rebuilding(state))

    def rebuilding(self, state: LatentState) -> Slices[None]:
        """`rebuild` in slices: sink first, then chunk by chunk.

        A live stream does this at every point and a loaded one at its start, so both go on from
        the same bits.
        """
        window, count = state.window, self.cache.frames_per_chunk
        window.clear()
        if state.has_history:
            self._show_memory(state)
        if not state.sink_BFCHW.shape[1]:
            return
        window.advance(state.sink_first, count)
        self._context_pass(
            state, state.sink_BFCHW, state.sink_first, see_memory=False, prompt=state.sink_prompt
        )
        end = state.next_chunk * count
        held = min(self.cache.local_frames, end - self.cache.sink_frames)
        for first in range(end - held, end, count):
            yield
            window.advance(first, count)
            latents = self._history(state, first, first + count)
            self._context_pass(state, latents, first, see_memory=state.has_history)

    def denoise(self, state: LatentState, noise: Noise) -> Tensor:
        """Clean latents [B, F, C, H, W] of the next chunk; `absorb` has to follow."""
        return whole(self.denoising(state, noise))

    def denoising(self, state: LatentState, noise: Noise) -> Slices[Tensor]:
        """`denoise` in slices: a forward for each denoising step."""
        count, chunk = self.cache.frames_per_chunk, state.next_chunk
        first = chunk * count
        update = self._leaving_update(state, count)
        state.window.advance(first, count)
        x = noise(chunk, 0)
        clean = x
        last = len(self.schedule) - 1
        for step, sigma in enumerate(self.schedule.sigmas):
            if step:
                yield
            flow = self._flow(
                state, x, self.schedule.timesteps[step], first, see_memory=state.has_history
            )
            if step == 0:
                # Frames that left are visible as memory from the second forward on.
                self._remember_leaving(state, update)
            clean = clean_from_flow(x, flow, sigma)
            if step < last:
                if self.schedule.kind == "euler":
                    epsilon = noise_from_flow(x, flow, sigma)
                else:
                    epsilon = noise(chunk, step + 1)
                x = renoise(clean, epsilon, self.schedule.sigmas[step + 1])
        return clean

    def _leaving_update(self, state: LatentState, incoming: int) -> Later | None:
        """Begin to update the memory by the frames that are about to leave, before slots move."""
        gone = state.window.leaving(incoming)
        memory, query_BMC = self.memory, state.query_BMC
        if not gone or memory is None or query_BMC is None:
            return None

        def update(query_BMC: Tensor, k_BNHD: Tensor, v_BNHD: Tensor) -> tuple[Tensor, ...]:
            query_BMC = memory.update(query_BMC, k_BNHD, v_BNHD)
            return query_BMC, *memory.read_out(query_BMC)

        evicted = state.window.last_layer(self.cache.sink_frames, gone)
        return self._aside.start(update, (query_BMC, *evicted))

    def _remember_leaving(self, state: LatentState, update: Later | None) -> None:
        if update is not None:
            state.query_BMC, k_BMHD, v_BMHD = update.join()
            state.has_history = True
            state.window.set_memory(k_BMHD, v_BMHD)

    def _flow(
        self, state: LatentState, x: Tensor, timestep: float, first: int, *, see_memory: bool
    ) -> Tensor:
        """What the transformer makes of the chunk at `first`; its keys and values are written."""
        count = x.shape[1]
        call = state.window.call(first, count, see_memory=see_memory)
        modulations = self._modulated(timestep, x.shape[0], count)
        forward = Forward(x, modulations, state.prompt, call)
        return forward.flow(self.dit, self._graphs(state, count))

    def _context_pass(
        self,
        state: LatentState,
        latents: Tensor,
        first: int,
        *,
        see_memory: bool,
        keep_sink: bool = False,
        prompt: PromptKV | None = None,
    ) -> None:
        """Leave the clean keys and values behind; there is no flow, and no noise is added."""
        count = latents.shape[1]
        call = state.window.call(first, count, see_memory=see_memory, keep_sink=keep_sink)
        modulations = self._modulated(self.schedule.context_noise, latents.shape[0], count)
        forward = Forward(latents, modulations, prompt or state.prompt, call)
        forward.context(self.dit, self._graphs(state, count))

    def _graphs(self, state: LatentState, frames: int) -> Graphs | None:
        """A recache, of more frames than a chunk, is too rare to be worth a recording."""
        return state.window.graphs if frames == self.cache.frames_per_chunk else None

    def _arena(self, batch: int) -> Arena:
        graphs = None if self._recorder is None else Graphs(self._recorder)
        return Arena(
            self.dit.shape, self.cache,
            batch=batch, device=self.device, dtype=self.dtype, graphs=graphs,
        )  # fmt: skip

    def _recache(self, state: LatentState, end: int) -> None:
        """One unmasked forward over the held frames under the new prompt."""
        held = min(self.cache.window_frames, end)
        start = end - held
        keep_sink = self.cache.global_sink and start > 0
        sink = state.window.sink_copy() if self.cache.global_sink else None
        bulk = held > self.cache.frames_per_chunk
        see_memory = state.has_history and (self.policy.memory_in_bulk or not bulk)
        if sink is None:
            self._adopt_sink(state, start)
            state.window.relabel(range(start, end))
        # A protected sink's frames would be queries whose keys are nowhere: leave them out.
        first = start + self.cache.sink_frames if keep_sink else start
        latents = self._history(state, first, end)
        self._context_pass(state, latents, first, see_memory=see_memory, keep_sink=keep_sink)
        if sink is not None:
            state.window.put_sink(sink)

    def _adopt_sink(self, state: LatentState, start: int) -> None:
        """Without a global sink the oldest recached frames become the sink."""
        state.sink_BFCHW = self._history(state, start, start + self.cache.sink_frames)
        state.sink_first = start
        state.sink_prompt = state.prompt

    def _rebuilt_memory_fits(self, state: LatentState, end: int) -> bool:
        """Whether a memory rebuilt now has room beside the sink in the next chunk's first call."""
        if not state.window.local_held:
            return False
        frames = list(state.window.frames)
        gone = state.window.leaving(self.cache.frames_per_chunk)
        sink = self.cache.sink_frames
        coming = range(end, end + self.cache.frames_per_chunk)
        slots = (*frames[:sink], *frames[sink + gone :], *coming)
        call = CallFrames(end, len(coming), slots, sink)
        return self.policy.memory_fits(call, self.cache.memory_frames)

    def _update_memory(self, state: LatentState, k_BNHD: Tensor, v_BNHD: Tensor) -> None:
        if self.memory is None or state.query_BMC is None:
            return
        state.query_BMC = self.memory.update(state.query_BMC, k_BNHD, v_BNHD)
        state.has_history = True
        self._show_memory(state)

    def _show_memory(self, state: LatentState) -> None:
        if self.memory is not None and state.query_BMC is not None:
            state.window.set_memory(*self.memory.read_out(state.query_BMC))

    def _remember(self, state: LatentState, clean: Tensor) -> None:
        sink = self.cache.sink_frames
        if state.next_chunk == 1:
            state.sink_BFCHW = clean[:, :sink].clone()
        keep = self.history_frames
        state.history_BFCHW = torch.cat([state.history_BFCHW, clean], dim=1)[:, -keep:].clone()

    def _history(self, state: LatentState, start: int, stop: int) -> Tensor:
        """Clean latents of frames start..stop-1, from the history or, before it, from the sink."""
        end = state.next_chunk * self.cache.frames_per_chunk
        oldest = end - state.history_BFCHW.shape[1]
        inside = state.history_BFCHW[:, max(start, oldest) - oldest : stop - oldest]
        missing = min(stop, oldest) - start
        if missing <= 0:
            return inside
        offset = start - state.sink_first
        return torch.cat([state.sink_BFCHW[:, offset : offset + missing], inside], dim=1)

    def _modulated(self, timestep: float, batch: int, frames: int) -> Modulations:
        """Computed once: a sampler has few timesteps, and calls have few lengths."""
        key = (timestep, batch, frames)
        if key not in self._modulations:
            t_BF = torch.full((batch, frames), timestep, dtype=torch.float64, device=self.device)
            self._modulations[key] = self.dit.modulations(self.dit.condition(t_BF))
        return self._modulations[key]
