"""A second, naive implementation of the rollout, written from the specification alone.

It shares no code with the package: tensors by checkpoint key, caches as lists of frames that are
concatenated and rotated anew in every forward, everything in float64. Slow and obvious on purpose;
tests compare the engine with it on geometries that no stored fixture has.

Shapes: B batch, N tokens, C width, H heads, D head size, T tokens per frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as fn


@dataclass
class Frame:
    """One cached frame: its index and, per layer, un-rotated keys and values [B, T, H, D]."""

    index: int
    k: list[Tensor]
    v: list[Tensor]


@dataclass
class Reference:
    """A model with its policy, and one stream's past."""

    weights: dict[str, Tensor]
    model: dict[str, Any]
    policy: dict[str, Any]
    steps: list[int]
    shift: float = 5.0
    context_noise: float = 0.0
    global_sink: bool = True
    memory_recache: bool = False
    sink: list[Frame] = field(default_factory=list)
    local: list[Frame] = field(default_factory=list)
    query: Tensor | None = None
    has_history: bool = False
    text: Tensor | None = None
    output: list[Tensor] = field(default_factory=list)
    """Clean latents, one tensor [B, C, h, w] per frame."""

    def w(self, key: str) -> Tensor:
        return self.weights["model." + key].double()

    def linear(self, x: Tensor, key: str) -> Tensor:
        return fn.linear(x, self.w(key + ".weight"), self.w(key + ".bias"))

    def rms(self, x: Tensor, key: str) -> Tensor:
        scale = torch.rsqrt((x * x).mean(-1, keepdim=True) + self.model["eps"])
        return x * scale * self.w(key + ".weight")

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.model["num_heads"], self.model["head_dim"])

    # ---- rotary embedding -------------------------------------------------------------------

    def rotate(self, x: Tensor, positions: list[int]) -> Tensor:
        """x [B, len(positions) * T, H, D]."""
        h, w = self.model["latent_height"] // 2, self.model["latent_width"] // 2
        pairs = self.model["head_dim"] // 2
        third = pairs // 3
        angles = []
        for p in positions:
            for r in range(h):
                for c in range(w):
                    row = []
                    for place, n in ((p, pairs - 2 * third), (r, third), (c, third)):
                        row += [place * 10000.0 ** (-i / n) for i in range(n)]
                    angles.append(row)
        table = torch.tensor(angles, dtype=torch.float64)[:, None, :]
        even, odd = x[..., 0::2], x[..., 1::2]
        cos, sin = table.cos(), table.sin()
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1])
        return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(2)

    # ---- positions (section 5) --------------------------------------------------------------

    def positions(self, first: int, count: int, memory: int) -> dict[str, list[int]]:
        sink, held = len(self.sink), len(self.local)
        match self.policy["variant"]:
            case "absolute":
                start = max(0, first + count - held - memory)
                return {
                    "sink": [f.index for f in self.sink],
                    "memory": list(range(start, start + memory)),
                    "local": [f.index for f in self.local],
                    "query": list(range(first, first + count)),
                }
            case "window":
                n = sink + held
                return {
                    "sink": list(range(sink)),
                    "memory": [],
                    "local": list(range(sink, n)),
                    "query": list(range(n - count, n)),
                }
        last = min(first + count - 1, self.policy["pmax"] - 1)
        local = last - held + 1
        return {
            "sink": list(range(sink)),
            "memory": list(range(local - memory, local)),
            "local": list(range(local, last + 1)),
            "query": list(range(last - count + 1, last + 1)),
        }

    # ---- transformer (section 3) ------------------------------------------------------------

    def forward(
        self, x: Tensor, t: float, first: int, *, memory: bool, write: list[Frame | None]
    ) -> Tensor:
        """x [B, F, C, h, w]; `write[i]` is the cached frame that frame i of the call refreshes."""
        m, frames = self.model, x.shape[1]
        weight = self.w("patch_embedding.weight")
        h = fn.conv3d(
            x.double().transpose(1, 2), weight, self.w("patch_embedding.bias"), stride=(1, 2, 2)
        )
        h = h.flatten(2).transpose(1, 2)
        half = m["freq_dim"] // 2
        angle = t * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        wave = torch.cat([angle.cos(), angle.sin()])[None]
        e = self.linear(fn.silu(self.linear(wave, "time_embedding.0")), "time_embedding.2")
        e0 = self.linear(fn.silu(e), "time_projection.1").view(1, 6, -1)
        assert self.text is not None
        text = fn.gelu(self.linear(self.text.double(), "text_embedding.0"), approximate="tanh")
        text = self.linear(text, "text_embedding.2")
        q_frames = self.policy["memory"]["Q_frames"] if memory else 0
        at = self.positions(first, frames, q_frames)
        for layer in range(m["num_layers"]):
            p = f"blocks.{layer}."
            s1, c1, g1, s2, c2, g2 = (self.w(p + "modulation") + e0).unbind(1)
            y = fn.layer_norm(h, h.shape[-1:], eps=m["eps"]) * (1 + c1) + s1
            h = h + g1 * self.self_attention(y, p + "self_attn.", layer, at, write, memory)
            y = fn.layer_norm(
                h, h.shape[-1:], self.w(p + "norm3.weight"), self.w(p + "norm3.bias"), m["eps"]
            )
            q = self.heads(self.rms(self.linear(y, p + "cross_attn.q"), p + "cross_attn.norm_q"))
            k = self.rms(self.linear(text, p + "cross_attn.k"), p + "cross_attn.norm_k")
            v = self.heads(self.linear(text, p + "cross_attn.v"))
            h = h + self.linear(self.attend(q, self.heads(k), v), p + "cross_attn.o")
            y = fn.layer_norm(h, h.shape[-1:], eps=m["eps"]) * (1 + c2) + s2
            y = fn.gelu(self.linear(y, p + "ffn.0"), approximate="tanh")
            h = h + g2 * self.linear(y, p + "ffn.2")
        shift, scale = (self.w("head.modulation") + e[:, None]).unbind(1)
        y = fn.layer_norm(h, h.shape[-1:], eps=m["eps"]) * (1 + scale) + shift
        return self.unpatchify(self.linear(y, "head.head"), frames)

    def self_attention(
        self,
        y: Tensor,
        p: str,
        layer: int,
        at: dict[str, list[int]],
        write: list[Frame | None],
        memory: bool,
    ) -> Tensor:
        q = self.heads(self.rms(self.linear(y, p + "q"), p + "norm_q"))
        k = self.heads(self.rms(self.linear(y, p + "k"), p + "norm_k"))
        v = self.heads(self.linear(y, p + "v"))
        t = k.shape[1] // len(write)
        for i, frame in enumerate(write):
            if frame is not None:
                frame.k[layer] = k[:, i * t : (i + 1) * t]
                frame.v[layer] = v[:, i * t : (i + 1) * t]
        keys = [self.rotate(f.k[layer], [at["sink"][i]]) for i, f in enumerate(self.sink)]
        values = [f.v[layer] for f in self.sink]
        if memory:
            mem_k, mem_v = self.read_memory()
            keys.append(self.rotate(mem_k, at["memory"]))
            values.append(mem_v)
        keys += [self.rotate(f.k[layer], [at["local"][i]]) for i, f in enumerate(self.local)]
        values += [f.v[layer] for f in self.local]
        out = self.attend(self.rotate(q, at["query"]), torch.cat(keys, 1), torch.cat(values, 1))
        return self.linear(out, p + "o")

    def unpatchify(self, y: Tensor, frames: int) -> Tensor:
        m = self.model
        rows, columns, channels = m["latent_height"] // 2, m["latent_width"] // 2, m["out_channels"]
        out = torch.zeros(y.shape[0], frames, channels, 2 * rows, 2 * columns, dtype=torch.float64)
        for n in range(y.shape[1]):
            f, rest = divmod(n, rows * columns)
            r, c = divmod(rest, columns)
            patch = y[:, n].view(-1, 2, 2, channels)
            for i in range(2):
                for j in range(2):
                    out[:, f, :, 2 * r + i, 2 * c + j] = patch[:, i, j]
        return out

    # ---- memory (section 6) -----------------------------------------------------------------

    def reset_memory(self, batch: int) -> None:
        if self.policy["memory"]:
            initial = self.w("query_memory_encoder.query_init")
            self.query, self.has_history = initial.repeat(batch, 1, 1), False

    def update_memory(self, gone: list[Frame]) -> None:
        assert self.query is not None
        e = "query_memory_encoder."
        k, v = self.encoder_view(gone)
        z = self.query
        for i in range(self.policy["memory"]["n_encoder_layers"]):
            p = f"{e}layers.{i}."
            q = self.rms(self.linear(self.rms(z, p + "norm1"), p + "q"), p + "norm_q")
            z = z + self.linear(self.attend(self.heads(q), k, v), p + "o")
            y = fn.gelu(self.linear(self.rms(z, p + "norm2"), p + "ffn.0"), approximate="tanh")
            z = z + self.linear(y, p + "ffn.2")
        y = fn.gelu(self.linear(z, e + "connector_proj.0"), approximate="tanh")
        new = self.rms(self.linear(y, e + "connector_proj.2"), e + "connector_proj.3")
        gate = self.linear(torch.cat([self.query, new], -1), e + "gate_linear").sigmoid()
        self.query, self.has_history = gate * self.query + (1 - gate) * new, True

    def encoder_view(self, frames: list[Frame]) -> tuple[Tensor, Tensor]:
        keys = [f.k[-1] for f in frames]
        if self.policy["variant"] == "absolute":
            keys = [self.rotate(f.k[-1], [f.index]) for f in frames]
        return torch.cat(keys, 1), torch.cat([f.v[-1] for f in frames], 1)

    def read_memory(self) -> tuple[Tensor, Tensor]:
        assert self.query is not None
        e = "query_memory_encoder."
        k = self.linear(self.query, e + "to_k")
        if self.policy["memory"]["normalize_memory_k"]:
            k = self.rms(k, e + "norm_k_out")
        return self.heads(k), self.heads(self.linear(self.query, e + "to_v"))

    # ---- rollout and switch (sections 4, 7, 8) ----------------------------------------------

    def sigma(self, t: float) -> float:
        table = [self.shift * u / (1 + (self.shift - 1) * u) for u in self.levels()]
        return min(table, key=lambda s: abs(1000 * s - t))

    @staticmethod
    def levels() -> list[float]:
        return [1 - i / 1000 for i in range(1000)]

    def chunk(self, noise: Tensor, renoise: Tensor) -> Tensor:
        """noise [B, F, C, h, w], renoise [steps - 1, B, F, C, h, w]; returns clean latents."""
        p = self.policy
        frames, first = p["frames_per_block"], len(self.output)
        layers = self.model["num_layers"]
        new = [Frame(first + i, [None] * layers, [None] * layers) for i in range(frames)]  # type: ignore[list-item]
        held = self.sink + self.local + new
        over = len(held) - p["window_frames_including_sink"]
        gone = self.local[: max(0, over)]
        self.sink, rest = held[: p["sink_frames"]], held[p["sink_frames"] :]
        self.local = rest[len(gone) :]
        x, clean = noise.double(), noise.double()
        times = [self.warp(k) for k in self.steps]
        write: list[Frame | None] = list(new)
        for j, t in enumerate(times):
            flow = self.forward(x, t, first, memory=self.has_history, write=write)
            if j == 0 and gone and p["memory"]:
                self.update_memory(gone)
            clean = x - self.sigma(t) * flow
            if j + 1 < len(times):
                s = self.sigma(times[j + 1])
                x = (1 - s) * clean + s * renoise[j].double()
        self.forward(clean, self.context_noise, first, memory=self.has_history, write=write)
        self.output += list(clean.unbind(1))
        return clean

    def warp(self, step: int) -> float:
        u = 1 - (1000 - step) / 1000
        return 1000 * self.shift * u / (1 + (self.shift - 1) * u)

    def switch(self, text: Tensor) -> None:
        self.text = text
        end = len(self.output)
        if end == 0:
            return
        window = self.policy["window_frames_including_sink"]
        n = min(window, end)
        start = end - n
        saved = [Frame(f.index, list(f.k), list(f.v)) for f in self.sink]
        if not self.global_sink:
            for i, f in enumerate(self.sink):
                f.index = start + i
        slots: list[Frame | None] = list(self.sink + self.local)
        if self.global_sink and start > 0:
            slots[: len(self.sink)] = [None] * len(self.sink)
        bulk = n > self.policy["frames_per_block"]
        memory = self.has_history and (not bulk or self.policy["variant"] == "absolute")
        latents = torch.stack(self.output[start:], dim=1)
        self.forward(latents, self.context_noise, start, memory=memory, write=slots)
        if self.global_sink:
            for f, old in zip(self.sink, saved, strict=True):
                f.k, f.v = old.k, old.v
        if self.policy["memory"] and self.memory_recache:
            self.reset_memory(text.shape[0])
            if self.local:
                self.update_memory(self.local)
