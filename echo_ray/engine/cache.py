"""The preallocated window of one session: static slots, written and viewed, never rebuilt.

Per layer the tiers lie side by side as [memory | sink | local, oldest first]. The memory tier comes
first because it is the one that may be absent: then every phase of a session (sink alone, growing
local tier, full window, window with memory, recache) is one contiguous view. Softmax does not care
about the order. Keys are stored un-rotated beside a rotated copy, which is renewed only where a
slot's content or frame position changed.

Shapes: Y layers, B batch, N tokens, H heads, D head size, T tokens per frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from echo_ray.errors import EngineError
from echo_ray.model.policies.policy import CachePolicy, CallFrames
from echo_ray.model.rope import FrameRope, rotate
from echo_ray.preset import CacheShape, DiTShape


@dataclass(frozen=True, slots=True)
class WindowCall:
    """One forward pass over the window (implements `echo_ray.model.attention.KVCall`)."""

    query_rope: Tensor
    _window: Window
    _key_rope: Tensor
    _dropped: int
    """Leading tokens of the call whose keys and values are written nowhere (protected sink)."""
    _write: slice
    """Tokens of the sink and local tiers that the call writes."""
    _first: int
    """First token presented: 0 with memory, the sink's first without."""

    def present(self, layer: int, k_BNHD: Tensor, v_BNHD: Tensor) -> tuple[Tensor, Tensor]:
        return self._window.exchange(
            layer,
            k_BNHD[:, self._dropped :],
            v_BNHD[:, self._dropped :],
            self._key_rope,
            self._write,
            self._first,
        )


class Window:
    """Keys and values of one session on one device."""

    def __init__(
        self,
        dit: DiTShape,
        cache: CacheShape,
        policy: CachePolicy,
        *,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._tokens = dit.tokens_per_frame
        self._cache = cache
        self._policy = policy
        self._rope = FrameRope(dit.grid_height, dit.grid_width, dit.head_dim, str(device))
        self._memory_tokens = cache.memory_frames * self._tokens
        window = cache.window_frames * self._tokens
        tail = (dit.num_heads, dit.head_dim)

        def slots(count: int) -> Tensor:
            return torch.zeros(dit.num_layers, batch, count, *tail, device=device, dtype=dtype)

        self._raw_YBNHD = slots(window)
        self._keys_YBNHD = slots(self._memory_tokens + window)
        self._values_YBNHD = slots(self._memory_tokens + window)
        self._memory_raw_BNHD: Tensor | None = None
        self._memory_positions: tuple[int, ...] = ()
        self._frames: list[int] = []
        self._positions: list[int | None] = []

    @property
    def frames(self) -> Sequence[int]:
        """Absolute indices of the frames held, sink first."""
        return self._frames

    @property
    def local_held(self) -> int:
        return max(0, len(self._frames) - self._cache.sink_frames)

    def clear(self) -> None:
        """Forget every frame; the memory's keys and values stay."""
        self._frames, self._positions = [], []

    def leaving(self, incoming: int) -> int:
        """Frames that have to leave before `incoming` new ones fit."""
        return max(0, len(self._frames) + incoming - self._cache.window_frames)

    def last_layer(self, first_slot: int, count: int) -> tuple[Tensor, Tensor]:
        """Last-layer keys (as the policy's encoder reads them) and values of some slots, viewed."""
        start, stop = first_slot * self._tokens, (first_slot + count) * self._tokens
        offset = self._memory_tokens
        rotated = self._keys_YBNHD[-1, :, offset + start : offset + stop]
        keys = rotated if self._policy.evicts_rotated_keys else self._raw_YBNHD[-1, :, start:stop]
        return keys, self._values_YBNHD[-1, :, offset + start : offset + stop]

    def advance(self, first: int, count: int) -> None:
        """Make room for `count` frames from `first` on: the oldest local frames leave."""
        gone = self.leaving(count)
        sink = self._cache.sink_frames
        if gone:
            self._shift(sink, gone)
            del self._frames[sink : sink + gone]
            kept = len(self._frames) - sink
            self._positions = self._positions[:sink] + [None] * kept
        self._frames += range(first, first + count)
        self._positions += [None] * count

    def relabel(self, frames: Sequence[int]) -> None:
        """The held slots now stand for these frames (a recache that replaces the sink)."""
        if len(frames) != len(self._frames):
            raise EngineError(f"relabel: {len(frames)} frames for {len(self._frames)} slots")
        self._frames = list(frames)

    def set_memory(self, k_BNHD: Tensor, v_BNHD: Tensor) -> None:
        """Give every layer the memory's values; its keys follow at the next call that sees them."""
        self._values_YBNHD[:, :, : self._memory_tokens] = v_BNHD
        self._memory_raw_BNHD = k_BNHD
        self._memory_positions = ()

    def sink_copy(self) -> tuple[Tensor, Tensor]:
        """The sink's un-rotated keys and values of all layers, to be put back after a recache."""
        stop = self._cache.sink_frames * self._tokens
        offset = self._memory_tokens
        values = self._values_YBNHD[:, :, offset : offset + stop]
        return self._raw_YBNHD[:, :, :stop].clone(), values.clone()

    def put_sink(self, sink: tuple[Tensor, Tensor]) -> None:
        raw, values = sink
        stop = raw.shape[2]
        offset = self._memory_tokens
        self._raw_YBNHD[:, :, :stop] = raw
        self._values_YBNHD[:, :, offset : offset + stop] = values
        self._positions[: self._cache.sink_frames] = [None] * self._cache.sink_frames

    def call(
        self, first: int, count: int, *, see_memory: bool, keep_sink: bool = False
    ) -> WindowCall:
        """A forward over the window's last `count` frames, from `first` on, rewriting their slots.

        `keep_sink`: the sink's slots are not written even if the call reaches into them.
        """
        held = len(self._frames)
        memory_frames = self._cache.memory_frames if see_memory else 0
        frames = CallFrames(first, count, tuple(self._frames), self._cache.sink_frames)
        layout = self._policy.layout(frames, memory_frames)
        start = held - count
        written = max(start, self._cache.sink_frames if keep_sink else 0)
        positions = [*layout.sink, *layout.local]
        self._renew(positions, before=written)
        self._positions = list(positions)
        if memory_frames and layout.memory != self._memory_positions:
            self._place_memory(layout.memory)
        t = self._tokens
        return WindowCall(
            query_rope=self._rope.table(layout.query),
            _window=self,
            _key_rope=self._rope.table(positions[written:]),
            _dropped=(written - start) * t,
            _write=slice(written * t, held * t),
            _first=0 if memory_frames else self._memory_tokens,
        )

    def exchange(
        self,
        layer: int,
        k_BNHD: Tensor,
        v_BNHD: Tensor,
        key_rope: Tensor,
        write: slice,
        first: int,
    ) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values into their slots; view all that are presented."""
        offset = self._memory_tokens
        target = slice(offset + write.start, offset + write.stop)
        self._raw_YBNHD[layer, :, write] = k_BNHD
        self._keys_YBNHD[layer, :, target] = rotate(k_BNHD, key_rope)
        self._values_YBNHD[layer, :, target] = v_BNHD
        return (
            self._keys_YBNHD[layer, :, first : target.stop],
            self._values_YBNHD[layer, :, first : target.stop],
        )

    def _shift(self, sink: int, gone: int) -> None:
        """Move local slots down by `gone` frames, in blocks that do not overlap."""
        t, offset = self._tokens, self._memory_tokens
        stop = len(self._frames)
        for slot in range(sink, stop - gone, gone):
            size = min(gone, stop - gone - slot)
            to = slice(slot * t, (slot + size) * t)
            source = slice((slot + gone) * t, (slot + gone + size) * t)
            self._raw_YBNHD[:, :, to] = self._raw_YBNHD[:, :, source]
            values = self._values_YBNHD[:, :, offset:]
            values[:, :, to] = values[:, :, source]

    def _renew(self, positions: Sequence[int], before: int) -> None:
        """Rotate the keys of slots below `before` whose content or position changed."""
        stale = [i for i in range(before) if self._positions[i] != positions[i]]
        t, offset = self._tokens, self._memory_tokens
        while stale:
            start = stale[0]
            run = next((n for n, i in enumerate(stale) if i != start + n), len(stale))
            del stale[:run]
            part = slice(start * t, (start + run) * t)
            table = self._rope.table(positions[start : start + run])
            target = slice(offset + part.start, offset + part.stop)
            # Layer by layer, for the product is taken in float64: all at once would be gigabytes.
            for raw_BNHD, keys_BNHD in zip(self._raw_YBNHD, self._keys_YBNHD, strict=True):
                keys_BNHD[:, target] = rotate(raw_BNHD[:, part], table)

    def _place_memory(self, positions: tuple[int, ...]) -> None:
        if self._memory_raw_BNHD is None:
            raise EngineError("memory is presented before it was set")
        rotated = rotate(self._memory_raw_BNHD, self._rope.table(positions))
        self._keys_YBNHD[:, :, : self._memory_tokens] = rotated
        self._memory_positions = positions
