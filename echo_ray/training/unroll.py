"""The cache of a served session as plain values, so that gradients flow through a whole clip.

The engine writes into static slots; here each chunk's clean keys and values are kept as they came
and joined for every call. Positions come from the policy object that also serves.

Shapes: B clips, K copies of each, N tokens of a call, M tokens presented, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from echo_ray.errors import ConfigError
from echo_ray.model.memory import MemoryEncoder
from echo_ray.model.policies.choose import choose_policy
from echo_ray.model.policies.policy import CallFrames, Layout
from echo_ray.model.rope import FrameRope
from echo_ray.preset import Preset
from echo_ray.training.fast import Pair, Past, turn

ChunkKV = list[Pair]
"""Keys, not rotated, and values of one chunk at t = 0, a pair [B, N, H, D] per layer."""


class Unrolled:
    """Follows one batch of clips chunk by chunk, as the engine's cache would."""

    def __init__(
        self,
        preset: Preset,
        memory: MemoryEncoder | None,
        batch: int,
        device: torch.device | None = None,
        *,
        sink_seen: bool = True,
    ) -> None:
        cache, dit = preset.cache, preset.dit
        self.frames = cache.frames_per_chunk
        self.sink_frames = cache.sink_frames
        self.local_chunks = cache.local_frames // cache.frames_per_chunk
        self.memory_frames = cache.memory_frames
        self.layers = dit.num_layers
        self.policy = choose_policy(cache)
        self.encoder = memory
        self.sink_seen = sink_seen
        self.batch = batch
        self.chunk = 0
        self.sink: ChunkKV | None = None
        self.local: list[ChunkKV] = []
        self.memory_state: Tensor | None = None
        self.memory: Pair | None = None
        self.device = device or torch.device("cpu")
        recache = cache.memory is not None and cache.memory.recache
        if self.policy.evicts_rotated_keys and memory is not None and recache:
            raise ConfigError(
                "cache.memory.recache: true is not trained under the cache policy "
                f"{cache.policy}, which hands rotated keys to its memory; set it to false",
                param="cache.memory.recache",
            )
        self._rope = FrameRope(dit.grid_height, dit.grid_width, dit.head_dim, str(self.device))

    def evict(self) -> None:
        """Let the chunk that leaves the window now, if any, go into the memory."""
        leaving = self.leave()
        if leaving is not None:
            self.remember(leaving)

    def leave(self) -> Pair | None:
        """Take the chunk that leaves the window now, if any: its last layer's keys and values.

        Keys are as the policy's memory reads them: not rotated, or as they stood in the last call.
        """
        if len(self.local) < self.local_chunks:
            return None
        key, value = self.local.pop(0)[-1]
        if self.policy.evicts_rotated_keys:
            before = (self.local_chunks - 1) * self.frames
            stood = self._layout(
                (self.chunk - 1) * self.frames, self.frames, before, with_memory=False
            )
            key = turn(key.float(), *self._turns(stood.local[: self.frames])).to(key.dtype)
        return key, value

    def remember(self, evicted: Pair, again: int = 0, rows_B: Tensor | None = None) -> None:
        """Update the memory; `again` as often once more in some rows, as if more had left."""
        if self.encoder is None:
            return
        state = self.memory_state
        if state is None:
            state = self.encoder.initial(self.batch)
        state = self.encoder.update(state, *evicted)
        if rows_B is not None:
            for _ in range(again):
                once_more = self.encoder.update(state, *evicted)
                state = torch.where(rows_B[:, None, None], once_more, state)
        self.set_memory(state)

    def set_memory(self, state: Tensor) -> None:
        if self.encoder is not None:
            self.memory_state = state
            self.memory = self.encoder.read_out(state)

    def view(self) -> tuple[Past | None, Pair]:
        """What the next chunk's pass sees before itself, and its own rotation."""
        if self.sink is None:
            return None, self._turns(tuple(range(self.frames)))
        first, held = self.chunk * self.frames, len(self.local) * self.frames
        layout = self._layout(first, self.frames, held, self.memory is not None)
        return self._past(layout, self.local, self.memory), self._turns(layout.query)

    def rebuild_view(self) -> tuple[Past | None, Pair]:
        """What a pass over all local frames at once sees: sink, themselves, memory by policy."""
        end, held = self.chunk * self.frames, len(self.local) * self.frames
        memory = self.memory if self.policy.memory_in_bulk else None
        layout = self._layout(end - held, held, 0, with_memory=memory is not None)
        return self._past(layout, [], memory), self._turns(layout.query)

    def whole_view(self) -> tuple[None, Pair]:
        """What a pass over sink and local frames at once sees: only themselves."""
        held = (1 + len(self.local)) * self.frames
        layout = self._layout(self.sink_frames, held - self.sink_frames, 0, with_memory=False)
        return None, self._turns((*layout.sink, *layout.local))

    def keep(self, clean: ChunkKV) -> None:
        """The chunk is done; `clean` are its keys and values at t = 0."""
        if self.sink is None:
            self.sink = clean
        else:
            self.local.append(clean)
        self.chunk += 1

    def replace_local(self, written: ChunkKV, rows_B: Tensor | None = None) -> None:
        """Take the keys and values of a rebuild for those of the local chunks, in some rows."""
        count = len(self.local)
        split = [
            list(zip(k.chunk(count, dim=1), v.chunk(count, dim=1), strict=True)) for k, v in written
        ]
        new = [[layer[c] for layer in split] for c in range(count)]
        if rows_B is not None:
            new = [_mixed(a, b, rows_B) for a, b in zip(new, self.local, strict=True)]
        self.local = new

    def detach(self) -> None:
        """Cut the past off from what made it: no gradient flows further back than here."""
        if self.sink is not None:
            self.sink = _detached(self.sink)
        self.local = [_detached(chunk) for chunk in self.local]
        if self.memory_state is not None and self.memory is not None:
            self.memory_state = self.memory_state.detach()
            self.memory = (self.memory[0].detach(), self.memory[1].detach())

    def state(self) -> dict[str, Any]:
        """Everything that makes the batch go on; only after `detach`."""
        return {
            "chunk": self.chunk,
            "sink": self.sink,
            "local": self.local,
            "memory_state": self.memory_state,
            "memory": self.memory,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.chunk = state["chunk"]
        self.sink = _placed(state["sink"], self.device) if state["sink"] else None
        self.local = [_placed(chunk, self.device) for chunk in state["local"]]
        kept, memory = state["memory_state"], state["memory"]
        self.memory_state = None if kept is None else kept.to(self.device)
        self.memory = None if memory is None else _placed([memory], self.device)[0]

    def _layout(self, first: int, count: int, before: int, with_memory: bool) -> Layout:
        slots = (*range(self.sink_frames), *range(first - before, first + count))
        call = CallFrames(first=first, count=count, slots=slots, sink_frames=self.sink_frames)
        return self.policy.layout(call, self.memory_frames if with_memory else 0)

    def _past(self, layout: Layout, chunks: list[ChunkKV], memory: Pair | None) -> Past | None:
        sink = self.sink if self.sink_seen else None
        if not (sink or memory or chunks):
            return None
        before = layout.local[: len(layout.local) - len(layout.query)]
        first = layout.sink if sink else ()
        positions = (*first, *(layout.memory if memory else ()), *before)
        layers: list[Pair] = []
        for layer in range(self.layers):
            kept = [sink[layer]] if sink else []
            tiers = [*kept, *([memory] if memory else []), *(c[layer] for c in chunks)]
            keys = torch.cat([k.float() for k, _ in tiers], dim=1)
            values = torch.cat([v.float() for _, v in tiers], dim=1)
            layers.append((keys, values))
        return Past(layers, *self._turns(positions))

    def _turns(self, positions: tuple[int, ...]) -> Pair:
        table = self._rope.table(positions)
        return table.real.float(), table.imag.float()


def _detached(chunk: ChunkKV) -> ChunkKV:
    return [(k.detach(), v.detach()) for k, v in chunk]


def _placed(chunk: ChunkKV, device: torch.device) -> ChunkKV:
    return [(k.to(device), v.to(device)) for k, v in chunk]


def _mixed(new: ChunkKV, old: ChunkKV, rows_B: Tensor) -> ChunkKV:
    """The new values in the given rows, the old ones in all others."""
    rows = rows_B[:, None, None, None]
    return [
        (torch.where(rows, k, was_k), torch.where(rows, v, was_v))
        for (k, v), (was_k, was_v) in zip(new, old, strict=True)
    ]
