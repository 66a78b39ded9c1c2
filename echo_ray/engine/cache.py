"""The window of one session over an arena's slots: written and viewed, never rebuilt.

Per layer the tiers lie side by side as [memory | sink | local, oldest first]. The memory tier comes
first because it is the one that may be absent: then every phase of a session (sink alone, growing
local tier, full window, window with memory, recache) is one contiguous view. Softmax does not care
about the order. Keys are stored un-rotated beside a rotated copy, which is renewed only where a
slot's content or frame position changed.

Shapes: Y layers, B batch, N tokens, H heads, D head size, T tokens per frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from echo_kernels import Slots, chunk_advance, place_memory
from echo_ray.engine.arena import Arena
from echo_ray.engine.graphs import Graphs
from echo_ray.errors import EngineError
from echo_ray.model.policies.policy import CachePolicy, CallFrames, Layout
from echo_ray.model.rope import FrameRope
from echo_ray.preset import CacheShape, DiTShape


@dataclass(frozen=True, slots=True)
class WindowCall:
    """One forward pass over the window (implements `echo_ray.model.attention.KVCall`)."""

    query_rope: Tensor
    key_rope: Tensor
    _window: Window
    _write: slice
    """Tokens of the sink and local tiers that the call writes, its last ones."""
    _first: int
    """First token presented: 0 with memory, the sink's first without."""

    def slots(self, layer: int) -> Slots:
        return self._window.slots(layer, self.query_rope, self.key_rope, self._write, self._first)

    @property
    def layout(self) -> tuple[int, int, int]:
        """Which slots are written and which are seen: what a recording of the call fixes."""
        return self._write.start, self._write.stop, self._first

    def turned_by(self, query_rope: Tensor, key_rope: Tensor) -> WindowCall:
        """The same call with these tables."""
        return replace(self, query_rope=query_rope, key_rope=key_rope)


class Window:
    """Keys and values of one session on one device, in an arena that is its own while it lives."""

    def __init__(self, dit: DiTShape, cache: CacheShape, policy: CachePolicy, arena: Arena) -> None:
        self._tokens = dit.tokens_per_frame
        self._cache = cache
        self._policy = policy
        self._arena: Arena | None = arena
        device = str(arena.raw_YBNHD.device)
        self._rope = FrameRope(dit.grid_height, dit.grid_width, dit.head_dim, device)
        self._memory_tokens = cache.memory_frames * self._tokens
        self._memory_k_BNHD: Tensor | None = None
        self._memory_v_BNHD: Tensor | None = None
        self._memory_positions: tuple[int, ...] = ()
        self._frames: list[int] = []
        self._positions: list[int | None] = []

    @property
    def graphs(self) -> Graphs | None:
        """What records forwards over this window's arena; None where all run eagerly."""
        return self.arena.graphs

    @property
    def arena(self) -> Arena:
        """Raises `EngineError` once the window is closed."""
        if self._arena is None:
            raise EngineError("the state is closed: open or load the session again")
        return self._arena

    @property
    def closed(self) -> bool:
        return self._arena is None

    def close(self) -> Arena:
        """Part with the arena; the window cannot be used any more."""
        arena, self._arena = self.arena, None
        return arena

    def tensors(self) -> list[Tensor]:
        """All that the window holds."""
        own = [t for t in (self._memory_k_BNHD, self._memory_v_BNHD) if t is not None]
        return own if self._arena is None else [*self._arena.tensors(), *own]

    @property
    def _raw_YBNHD(self) -> Tensor:
        return self.arena.raw_YBNHD

    @property
    def _keys_YBNHD(self) -> Tensor:
        return self.arena.keys_YBNHD

    @property
    def _values_YBNHD(self) -> Tensor:
        return self.arena.values_YBNHD

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
        sink, held = self._cache.sink_frames, len(self._frames)
        if gone:
            del self._frames[sink : sink + gone]
        self._frames += range(first, first + count)
        if gone:
            self._shift(sink, held, gone, self._layout(first, count, 0).local)
        self._positions += [None] * count

    def relabel(self, frames: Sequence[int]) -> None:
        """The held slots now stand for these frames (a recache that replaces the sink)."""
        if len(frames) != len(self._frames):
            raise EngineError(f"relabel: {len(frames)} frames for {len(self._frames)} slots")
        self._frames = list(frames)

    def set_memory(self, k_BNHD: Tensor, v_BNHD: Tensor) -> None:
        """The memory's un-rotated pair; every layer gets it at the next call that sees it."""
        self._memory_k_BNHD, self._memory_v_BNHD = k_BNHD, v_BNHD
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
        layout = self._layout(first, count, memory_frames)
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
            key_rope=self._rope.table(positions[written:]),
            _window=self,
            _write=slice(written * t, held * t),
            _first=0 if memory_frames else self._memory_tokens,
        )

    def slots(
        self, layer: int, query_rope: Tensor, key_rope: Tensor, write: slice, first: int
    ) -> Slots:
        """Where one layer's new keys and values go, and all that are presented."""
        offset = self._memory_tokens
        target = slice(offset + write.start, offset + write.stop)
        keys_BNHD, values_BNHD = self._keys_YBNHD[layer], self._values_YBNHD[layer]
        return Slots(
            query_rope,
            key_rope,
            raw_BKHD=self._raw_YBNHD[layer, :, write],
            keys_BKHD=keys_BNHD[:, target],
            values_BKHD=values_BNHD[:, target],
            seen_keys_BMHD=keys_BNHD[:, first : target.stop],
            seen_values_BMHD=values_BNHD[:, first : target.stop],
        )

    def _layout(self, first: int, count: int, memory_frames: int) -> Layout:
        frames = CallFrames(first, count, tuple(self._frames), self._cache.sink_frames)
        return self._policy.layout(frames, memory_frames)

    def _shift(self, sink: int, held: int, gone: int, positions: Sequence[int]) -> None:
        """Move local slots down by `gone` frames, to the local tier's next positions."""
        kept = held - sink - gone
        if kept:
            self._turn(sink, held, gone, positions[:kept])
        self._positions = [*self._positions[:sink], *positions[:kept]]

    def _renew(self, positions: Sequence[int], before: int) -> None:
        """Rotate the keys of slots below `before` whose content or position changed."""
        stale = [i for i in range(before) if self._positions[i] != positions[i]]
        while stale:
            start = stale[0]
            run = next((n for n, i in enumerate(stale) if i != start + n), len(stale))
            del stale[:run]
            self._turn(start, start + run, 0, positions[start : start + run])

    def _turn(self, start: int, stop: int, gone: int, positions: Sequence[int]) -> None:
        """In slots of all layers: drop the first `gone` frames, rotate the rest to `positions`."""
        t, offset = self._tokens, self._memory_tokens
        raw = slice(start * t, stop * t)
        rotated = slice(offset + raw.start, offset + raw.stop)
        chunk_advance(
            self._raw_YBNHD[:, :, raw],
            self._keys_YBNHD[:, :, rotated],
            self._values_YBNHD[:, :, rotated],
            self._rope.table(positions),
            gone * t,
        )

    def _place_memory(self, positions: tuple[int, ...]) -> None:
        if self._memory_k_BNHD is None or self._memory_v_BNHD is None:
            raise EngineError("memory is presented before it was set")
        tier = slice(0, self._memory_tokens)
        place_memory(
            self._memory_k_BNHD,
            self._memory_v_BNHD,
            self._rope.table(positions),
            self._keys_YBNHD[:, :, tier],
            self._values_YBNHD[:, :, tier],
        )
        self._memory_positions = positions
