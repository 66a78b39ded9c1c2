"""R0: the published loop, operation by operation, on the engine's own weights.

Baseline of every speed-up and oracle of the parity gate, so it shares no arithmetic with `engine`
and `model`: un-rotated keys that are cloned, rolled, concatenated and rotated anew in float64 in
every layer of every forward; indices that live on the device and are read one by one; the text
projection, the time embedding and the memory's pair in every forward; context passes to the end.
Knows the relative policy (`echo`) alone.

Shapes: B batch, N call tokens, K cached tokens, H heads, D head size, C width, F frames of a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as fn

from echo_ray.benchmark.baseline_maths import (
    Attend,
    Turns,
    attend_plain,
    gelu_mlp,
    layer_norm,
    rms_norm,
    sigma_of,
    sinusoid,
    unpatchify,
)
from echo_ray.benchmark.baseline_memory import BaselineMemory
from echo_ray.engine.generator import Noise
from echo_ray.errors import ConfigError
from echo_ray.preset import Preset

Weights = Mapping[str, Tensor]


@dataclass(slots=True)
class LayerCache:
    """One layer's window, un-rotated, and how much of it is filled, as the device knows it."""

    k_BKHD: Tensor
    v_BKHD: Tensor
    global_end: Tensor
    local_end: Tensor


@dataclass(slots=True)
class Stream:
    """A stream between two chunks."""

    text_BPE: Tensor
    caches: list[LayerCache]
    query_BMC: Tensor | None
    has_history: bool = False
    cross: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Cross-attention's keys and values, made by the first forward under a prompt."""
    latents: list[Tensor] = field(default_factory=list)
    """The latest clean chunks, as many as a prompt switch reads."""
    next_chunk: int = 0


@dataclass(frozen=True, slots=True)
class _Write:
    """What a forward leaves for one layer's cache: applied when all layers are through."""

    k_BNHD: Tensor
    v_BNHD: Tensor
    start: int
    stop: int
    dropped: int
    """Tokens at the call's beginning that are not written: a protected sink."""
    evicted: int
    rolled: int


@dataclass(frozen=True, slots=True)
class _Call:
    first: int
    frames: int
    memory: tuple[Tensor, Tensor] | None


class Baseline:
    """The published rollout; weights are those of `dit` and `memory`, by the checkpoint's names."""

    def __init__(
        self, preset: Preset, dit: Weights, memory: Weights | None, attend: Attend = attend_plain
    ) -> None:
        """Raises `ConfigError` for a cache policy that this loop does not have."""
        if preset.cache.policy != "echo":
            raise ConfigError(
                f"cache.policy: the baseline knows echo, not {preset.cache.policy!r}; "
                "benchmark echo-infinity-1.3b or echo-tiny",
                param="preset",
            )
        self.shape, self.cache, self.sampler = preset.dit, preset.cache, preset.sampler
        self.dit, self.attend = dit, attend
        self.memory = None
        if memory is not None and preset.cache.memory is not None:
            self.memory = BaselineMemory(memory, preset.dit, preset.cache.memory)
        patch = dit["patch_embedding.weight"]
        self.device, self.dtype = patch.device, patch.dtype
        self.tokens = preset.dit.tokens_per_frame
        self.turns = Turns.of(preset, self.device)
        self.residuals: list[Tensor] | None = None
        """Set to a list: every layer's residual stream is appended to it."""

    # ---- rollout ----------------------------------------------------------------------------

    def start(self, text_BPE: Tensor) -> Stream:
        """A stream before its first chunk, under prompt embeddings [B, P, text width]."""
        batch, s = text_BPE.shape[0], self.shape
        size = (batch, self.cache.window_frames * self.tokens, s.num_heads, s.head_dim)

        def index() -> Tensor:
            return torch.zeros(1, dtype=torch.long, device=self.device)

        def empty() -> Tensor:
            return torch.zeros(size, device=self.device, dtype=self.dtype)

        caches = [LayerCache(empty(), empty(), index(), index()) for _ in range(s.num_layers)]
        return Stream(text_BPE, caches, self._initial_query(batch))

    def generate(self, stream: Stream, noise: Noise) -> Tensor:
        """Clean latents [B, F, channels, h, w] of the next chunk, which joins the past."""
        count, chunk = self.cache.frames_per_chunk, stream.next_chunk
        first = chunk * count
        x = noise(chunk, 0)
        clean, steps = x, self.sampler.steps
        for number, step in enumerate(steps):
            t_BF = self._timesteps(step, x)
            gone = self._leaving(stream, count) if number == 0 else None
            flow = self._forward(stream, x, t_BF, first)
            if gone is not None:
                self._update_memory(stream, *gone)
            sigma = sigma_of(t_BF, self.sampler.shift)
            clean = (x.double() - sigma * flow.double()).to(x.dtype)
            if number + 1 < len(steps):
                after = sigma_of(self._timesteps(steps[number + 1], x), self.sampler.shift)
                if self.sampler.kind == "euler":
                    epsilon = (x.double() + (1 - sigma) * flow.double()).to(x.dtype)
                else:
                    epsilon = noise(chunk, number + 1)
                x = ((1 - after) * clean.double() + after * epsilon.double()).to(x.dtype)
        self._context_pass(stream, clean, first)
        keep = self.cache.window_frames // count
        stream.latents = [*stream.latents, clean][-keep:]
        stream.next_chunk += 1
        return clean

    def switch(self, stream: Stream, text_BPE: Tensor) -> None:
        """Another prompt from the next chunk on; the window is recomputed under it."""
        stream.text_BPE, stream.cross = text_BPE, []
        end = stream.next_chunk * self.cache.frames_per_chunk
        if end == 0:
            return
        held = min(self.cache.window_frames, end)
        sink = self.cache.sink_frames * self.tokens
        kept = [(c.k_BKHD[:, :sink].clone(), c.v_BKHD[:, :sink].clone()) for c in stream.caches]
        bulk = held > self.cache.frames_per_chunk
        self._context_pass(stream, torch.cat(stream.latents, dim=1), end - held, bulk=bulk)
        for cache, (k, v) in zip(stream.caches, kept, strict=True):
            cache.k_BKHD[:, :sink] = k
            cache.v_BKHD[:, :sink] = v
        if self.cache.memory is not None and self.cache.memory.recache:
            stream.query_BMC = self._initial_query(text_BPE.shape[0])
            stream.has_history = False
            if self._memory_has_room(end):
                last = stream.caches[-1]
                stop = held * self.tokens
                self._update_memory(stream, last.k_BKHD[:, sink:stop], last.v_BKHD[:, sink:stop])

    def window(self, stream: Stream, layer: int) -> tuple[Tensor, Tensor]:
        """Rotated keys and values [B, K, H, D] a next forward would see, without its own chunk.

        Sink, then local frames at the positions that the latest chunk had.
        """
        cache, end = stream.caches[layer], stream.next_chunk * self.cache.frames_per_chunk
        stop = int(cache.local_end.item())
        k = cache.k_BKHD[:, :stop]
        at = self._positions(end - self.cache.frames_per_chunk, self.cache.frames_per_chunk, stop)
        sink = self.cache.sink_frames * self.tokens
        keys = [self.turns.turn(k[:, :sink], 0)]
        if stop > sink:
            keys.append(self.turns.turn(k[:, sink:], at[0]))
        return torch.cat(keys, dim=1), cache.v_BKHD[:, :stop]

    # ---- one forward ------------------------------------------------------------------------

    def _forward(
        self, stream: Stream, x: Tensor, t_BF: Tensor, first: int, *, bulk: bool = False
    ) -> Tensor:
        """Flow of x [B, F, channels, h, w]; every layer's cache takes the call's keys after it."""
        w, s, frames = self.dit, self.shape, x.shape[1]
        patches = fn.conv3d(
            x.transpose(1, 2), w["patch_embedding.weight"], w["patch_embedding.bias"],
            stride=s.patch_size,
        )  # fmt: skip
        h = patches.flatten(2).transpose(1, 2)
        wave = sinusoid(t_BF.flatten(), s.freq_dim).to(self.dtype)
        e = self._linear(fn.silu(self._linear(wave, "time_embedding.0")), "time_embedding.2")
        e0 = self._linear(fn.silu(e), "time_projection.1").view(*t_BF.shape, 6, s.dim)
        text = gelu_mlp(self.dit, "text_embedding.0", "text_embedding.2", stream.text_BPE)
        if not stream.cross:
            stream.cross = [self._cross_pair(text, layer) for layer in range(s.num_layers)]
        call = _Call(first, frames, None if bulk else self._memory_pair(stream))
        writes = []
        for layer, cache in enumerate(stream.caches):
            h, write = self._block(h, e0, stream.cross[layer], cache, call, layer)
            writes.append(write)
            if self.residuals is not None:
                self.residuals.append(h)
        for cache, write in zip(stream.caches, writes, strict=True):
            self._apply(cache, write, first + frames)
        shift, scale = (w["head.modulation"].unsqueeze(1) + e.view(*t_BF.shape, 1, -1)).unbind(2)
        out = self._modulated(h, scale, shift, frames)
        return unpatchify(self._linear(out, "head.head"), frames, s)

    def _block(
        self,
        h: Tensor,
        e0: Tensor,
        cross: tuple[Tensor, Tensor],
        cache: LayerCache,
        call: _Call,
        layer: int,
    ) -> tuple[Tensor, _Write]:
        p, w = f"blocks.{layer}.", self.dit
        table = (w[p + "modulation"].unsqueeze(1) + e0).chunk(6, dim=2)
        shift1, scale1, gate1, shift2, scale2, gate2 = (part.squeeze(2) for part in table)
        y = self._modulated(h, scale1, shift1, call.frames)
        y, write = self._self_attention(y, p + "self_attn.", cache, call)
        h = self._gated(h, y, gate1, call.frames)
        y = h
        if self.shape.cross_attn_norm:
            y = layer_norm(h, self.shape.eps, w[p + "norm3.weight"], w[p + "norm3.bias"])
        q = self._heads(self._normed(y, p + "cross_attn.", "q"))
        read = self.attend(q, *cross)
        h = h + self._linear(read, p + "cross_attn.o")
        y = self._modulated(h, scale2, shift2, call.frames)
        y = gelu_mlp(self.dit, p + "ffn.0", p + "ffn.2", y)
        return self._gated(h, y, gate2, call.frames), write

    def _self_attention(
        self, y: Tensor, p: str, cache: LayerCache, call: _Call
    ) -> tuple[Tensor, _Write]:
        q = self._heads(self._normed(y, p, "q"))
        k = self._heads(self._normed(y, p, "k"))
        v = self._heads(self._linear(y, p + "v"))
        write = self._placed(k, v, cache, call)
        keys, values = cache.k_BKHD.clone(), cache.v_BKHD.clone()
        self._put(keys, values, write)
        local_at, memory_at, query_at = self._positions(call.first, call.frames, write.stop)
        sink = self.cache.sink_frames * self.tokens
        seen_k = [self.turns.turn(keys[:, :sink], 0)]
        seen_v = [values[:, :sink]]
        if call.memory is not None:
            seen_k.append(self.turns.turn(call.memory[0], memory_at))
            seen_v.append(call.memory[1])
        if write.stop > sink:
            seen_k.append(self.turns.turn(keys[:, sink : write.stop], local_at))
            seen_v.append(values[:, sink : write.stop])
        q = self.turns.turn(q, query_at)
        read = self.attend(q, torch.cat(seen_k, dim=1), torch.cat(seen_v, dim=1))
        return self._linear(read, p + "o"), write

    def _placed(self, k: Tensor, v: Tensor, cache: LayerCache, call: _Call) -> _Write:
        """Where the call's tokens go; every index is read from the device where it is used."""
        count = k.shape[1]
        end = (call.first + call.frames) * self.tokens
        sink, size = self.cache.sink_frames * self.tokens, cache.k_BKHD.shape[1]
        again = end <= cache.global_end.item() and call.first > 0
        evicted = rolled = 0
        if end > cache.global_end.item() and count + cache.local_end.item() > size:
            evicted = int(count + cache.local_end.item() - size)
            rolled = int(cache.local_end.item() - evicted - sink)
        stop = int(cache.local_end.item() + end - cache.global_end.item() - evicted)
        dropped = max(0, sink - (stop - count)) if again else 0
        return _Write(k, v, stop - count, stop, dropped, evicted, rolled)

    def _put(self, keys: Tensor, values: Tensor, write: _Write) -> None:
        """Roll what stays, and insert the call's keys and values."""
        sink = self.cache.sink_frames * self.tokens
        if write.evicted:
            kept = slice(sink, sink + write.rolled)
            moved = slice(kept.start + write.evicted, kept.stop + write.evicted)
            keys[:, kept] = keys[:, moved].clone()
            values[:, kept] = values[:, moved].clone()
        into = slice(write.start + write.dropped, write.stop)
        keys[:, into] = write.k_BNHD[:, write.dropped :]
        values[:, into] = write.v_BNHD[:, write.dropped :]

    def _apply(self, cache: LayerCache, write: _Write, end_frame: int) -> None:
        self._put(cache.k_BKHD, cache.v_BKHD, write)
        cache.global_end.fill_(end_frame * self.tokens)
        cache.local_end.fill_(write.stop)

    def _positions(self, first: int, frames: int, stop: int) -> tuple[int, int, int]:
        """First frame positions of the local tier, the memory and the queries."""
        local = stop // self.tokens - self.cache.sink_frames
        if local <= 0:
            return 0, 0, 0
        last = min(first + frames, self.cache.position_limit) - 1
        start = last - local + 1
        return start, start - self.cache.memory_frames, last - frames + 1

    def _context_pass(
        self, stream: Stream, clean: Tensor, first: int, *, bulk: bool = False
    ) -> None:
        t_BF = clean.new_full(clean.shape[:2], self.sampler.context_noise, dtype=torch.float64)
        self._forward(stream, clean, t_BF, first, bulk=bulk)

    # ---- memory -----------------------------------------------------------------------------

    def _initial_query(self, batch: int) -> Tensor | None:
        return None if self.memory is None else self.memory.initial(batch)

    def _leaving(self, stream: Stream, incoming: int) -> tuple[Tensor, Tensor] | None:
        """The last layer's keys and values that the next chunk pushes out; none while it fits."""
        last = stream.caches[-1]
        over = int(last.local_end.item()) + incoming * self.tokens - last.k_BKHD.shape[1]
        if over <= 0 or self.memory is None:
            return None
        start = self.cache.sink_frames * self.tokens
        part = slice(start, start + over)
        return last.k_BKHD[:, part].clone(), last.v_BKHD[:, part].clone()

    def _update_memory(self, stream: Stream, k_BEHD: Tensor, v_BEHD: Tensor) -> None:
        if self.memory is not None and stream.query_BMC is not None:
            stream.query_BMC = self.memory.updated(stream.query_BMC, k_BEHD, v_BEHD, self.attend)
            stream.has_history = True

    def _memory_pair(self, stream: Stream) -> tuple[Tensor, Tensor] | None:
        if self.memory is None or stream.query_BMC is None or not stream.has_history:
            return None
        return self.memory.pair(stream.query_BMC)

    def _memory_has_room(self, end: int) -> bool:
        """Whether a memory rebuilt now stands clear of the sink in the next chunk's first call."""
        count, c = self.cache.frames_per_chunk, self.cache
        if end <= c.sink_frames:
            return False
        stop = min(end + count, c.window_frames) * self.tokens
        return self._positions(end, count, stop)[1] >= c.sink_frames

    # ---- parts ------------------------------------------------------------------------------

    def _linear(self, x: Tensor, key: str) -> Tensor:
        return fn.linear(x, self.dit[key + ".weight"], self.dit[key + ".bias"])

    def _normed(self, x: Tensor, p: str, name: str) -> Tensor:
        y = self._linear(x, p + name)
        if not self.shape.qk_norm:
            return y
        return rms_norm(y, self.dit[f"{p}norm_{name}.weight"], self.shape.eps)

    def _cross_pair(self, text: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        p = f"blocks.{layer}.cross_attn."
        return self._heads(self._normed(text, p, "k")), self._heads(self._linear(text, p + "v"))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.shape.num_heads, self.shape.head_dim)

    def _modulated(self, h: Tensor, scale: Tensor, shift: Tensor, frames: int) -> Tensor:
        y = self._by_frame(layer_norm(h, self.shape.eps), frames)
        return (y * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2)

    def _gated(self, h: Tensor, y: Tensor, gate: Tensor, frames: int) -> Tensor:
        return h + (self._by_frame(y, frames) * gate.unsqueeze(2)).flatten(1, 2)

    def _by_frame(self, y: Tensor, frames: int) -> Tensor:
        return y.view(-1, frames, self.tokens, self.shape.dim)

    def _timesteps(self, step: int, x: Tensor) -> Tensor:
        """The warped timestep of every frame, [B, F] in float64."""
        u = step / 1000.0
        sigma = self.sampler.shift * u / (1 + (self.sampler.shift - 1) * u)
        t = torch.tensor(1000.0 * sigma, dtype=torch.float64).to(torch.float32)
        return x.new_full(x.shape[:2], float(t), dtype=torch.float64)
