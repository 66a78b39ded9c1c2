"""The cache of a served session as plain values, so that gradients flow through a whole clip.

The engine writes into static slots; here each chunk's clean keys and values are kept as they came
and joined for every call. Positions come from the policy object that also serves.

Shapes: B clips, K copies of each, N tokens of a call, M tokens presented, H heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from echo_ray.model.memory import MemoryEncoder
from echo_ray.model.policies.choose import choose_policy
from echo_ray.model.policies.policy import CallFrames, Layout
from echo_ray.model.rope import FrameRope
from echo_ray.preset import Preset
from echo_ray.training.fast import Pair, Past

ChunkKV = list[Pair]
"""Keys, not rotated, and values of one chunk at t = 0, a pair [B, N, H, D] per layer."""


class Unrolled:
    """Follows one batch of clips chunk by chunk, as the engine's cache would."""

    def __init__(self, preset: Preset, memory: MemoryEncoder | None, batch: int) -> None:
        cache, dit = preset.cache, preset.dit
        self.frames = cache.frames_per_chunk
        self.sink_frames = cache.sink_frames
        self.local_chunks = cache.local_frames // cache.frames_per_chunk
        self.memory_frames = cache.memory_frames
        self.layers = dit.num_layers
        self.policy = choose_policy(cache)
        self.encoder = memory
        self.batch = batch
        self.chunk = 0
        self.sink: ChunkKV | None = None
        self.local: list[ChunkKV] = []
        self.memory_state: Tensor | None = None
        self.memory: Pair | None = None
        self._rope = FrameRope(dit.grid_height, dit.grid_width, dit.head_dim, "cpu")

    def evict(self) -> None:
        """Let the chunk that leaves the window now, if any, go into the memory."""
        if len(self.local) < self.local_chunks:
            return
        evicted = self.local.pop(0)
        if self.encoder is None:
            return
        state = self.memory_state
        if state is None:
            state = self.encoder.initial(self.batch)
        self.memory_state = self.encoder.update(state, *evicted[-1])
        self.memory = self.encoder.read_out(self.memory_state)

    def view(self) -> tuple[Past | None, Pair]:
        """What the next chunk's pass sees before itself, and its own rotation."""
        if self.sink is None:
            return None, self._turns(tuple(range(self.frames)))
        first, held = self.chunk * self.frames, len(self.local) * self.frames
        layout = self._layout(first, self.frames, held, self.memory is not None)
        return self._past(layout, self.local, self.memory), self._turns(layout.query)

    def rebuild_view(self) -> tuple[Past | None, Pair]:
        """What a pass over all local frames at once sees: the sink and themselves."""
        end, held = self.chunk * self.frames, len(self.local) * self.frames
        layout = self._layout(end - held, held, 0, with_memory=False)
        return self._past(layout, [], None), self._turns(layout.query)

    def keep(self, clean: ChunkKV) -> None:
        """The chunk is done; `clean` are its keys and values at t = 0."""
        if self.sink is None:
            self.sink = clean
        else:
            self.local.append(clean)
        self.chunk += 1

    def replace_local(self, written: ChunkKV) -> None:
        """Take the keys and values of a rebuild for those of the local chunks."""
        count = len(self.local)
        split = [
            list(zip(k.chunk(count, dim=1), v.chunk(count, dim=1), strict=True)) for k, v in written
        ]
        self.local = [[layer[c] for layer in split] for c in range(count)]

    def _layout(self, first: int, count: int, before: int, with_memory: bool) -> Layout:
        slots = (*range(self.sink_frames), *range(first - before, first + count))
        call = CallFrames(first=first, count=count, slots=slots, sink_frames=self.sink_frames)
        return self.policy.layout(call, self.memory_frames if with_memory else 0)

    def _past(self, layout: Layout, chunks: list[ChunkKV], memory: Pair | None) -> Past | None:
        if self.sink is None:
            return None
        before = layout.local[: len(layout.local) - len(layout.query)]
        positions = (*layout.sink, *(layout.memory if memory else ()), *before)
        layers: list[Pair] = []
        for layer in range(self.layers):
            tiers = [self.sink[layer], *([memory] if memory else []), *(c[layer] for c in chunks)]
            keys = torch.cat([k.float() for k, _ in tiers], dim=1)
            values = torch.cat([v.float() for _, v in tiers], dim=1)
            layers.append((keys, values))
        return Past(layers, *self._turns(positions))

    def _turns(self, positions: tuple[int, ...]) -> Pair:
        table = self._rope.table(positions)
        return table.real.float(), table.imag.float()
