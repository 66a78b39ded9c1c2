"""Every fused op with arguments of a chunk's size; the same values in every dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from echo_kernels import (
    Rows8,
    Slots,
    chunk_advance,
    frames_to_uint8,
    gelu_rows8,
    heads8,
    layernorm_modulate,
    layernorm_modulate8,
    linear8,
    memory_gate_blend,
    norm_silu_join,
    place_memory,
    qk_norm_rope_write,
    residual_layernorm,
    residual_layernorm8,
    residual_modulate,
    residual_modulate8,
    rms_norm,
    rows8,
)
from echo_ray.benchmark.subject import Bench
from echo_ray.model.rope import FrameRope
from echo_ray.preset import WanVaeShape

EIGHT_BITS = frozenset(
    ("rows8", "gelu_rows8", "heads8", "layernorm_modulate8", "residual_modulate8",
     "residual_layernorm8", "linear8")
)  # fmt: skip
"""Ops whose kernels write or read 8-bit floats, which not every GPU has."""
_DRY_WIDTH, _DRY_SIDE = 8, 4
_PICTURES = 4
"""Frames of a latent."""
_PAST = 2


@dataclass(frozen=True, slots=True)
class Call:
    """An op and its arguments; one that writes into them has its result in `written`."""

    op: Any
    args: tuple[Any, ...]
    written: Tensor | None = None

    def result(self, made: Any) -> Tensor:
        """The numbers that an op made; of two results, of the one that was made of the other."""
        if self.written is not None:
            return self.written
        if isinstance(made, Rows8):
            return made.values.float() * made.scales
        return made if isinstance(made, Tensor) else self.result(made[-1])

    def size_bytes(self, made: Any) -> int:
        """What the op reads and writes."""
        return sum(t.numel() * t.element_size() for t in _tensors((self.args, made)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def calls(bench: Bench, dtype: torch.dtype) -> dict[str, Call]:
    """By the op's name: those of a forward, of a chunk's end, of 8 bits, of a decoder."""
    found = _forward(bench, dtype) | _window(bench, dtype) | _decoder(bench, dtype)
    return {call.op.name: call for call in found.values()}


def _forward(bench: Bench, dtype: torch.dtype) -> dict[str, Call]:
    dit, count = bench.preset.dit, bench.preset.cache.frames_per_chunk
    tokens = count * dit.tokens_per_frame
    rows, frames = (1, tokens, dit.dim), (1, count, dit.dim)
    x, y, z = (drawn(bench, dtype, n, *rows) for n in (1, 2, 3))
    gate, shift, scale = (drawn(bench, dtype, n, *frames) for n in (4, 5, 6))
    weight, bias = drawn(bench, dtype, 7, dit.dim), drawn(bench, dtype, 8, dit.dim)
    at, heads = _rope(bench, count), (1, tokens, dit.num_heads, dit.head_dim)
    raw, keys, values = (torch.zeros(heads, dtype=dtype, device=bench.device) for _ in range(3))
    slots = Slots(at, at, raw, keys, values, keys, values)
    powers = torch.full((dit.num_heads,), 2.0**-6, device=bench.device)
    rows_x, rows_w = (rows8.truth(t) for t in (x, drawn(bench, dtype, 9, dit.dim, dit.dim)))
    modulated, normed = (shift, scale, dit.eps), (weight, bias, dit.eps)
    listed = [
        Call(layernorm_modulate, (x, *modulated)),
        Call(qk_norm_rope_write, (x, y, z, weight, weight, dit.eps, slots)),
        Call(residual_modulate, (x, y, gate, *modulated)),
        Call(residual_layernorm, (x, y, gate, *normed)),
        Call(rms_norm, (x, weight, dit.eps)),
        Call(memory_gate_blend, (x, y, z)),
        Call(rows8, (x,)),
        Call(gelu_rows8, (drawn(bench, dtype, 10, 1, tokens, dit.ffn_dim),)),
        Call(heads8, (x.view(heads), powers)),
        Call(layernorm_modulate8, (x, *modulated)),
        Call(residual_modulate8, (x, y, gate, *modulated)),
        Call(residual_layernorm8, (x, y, gate, *normed)),
        Call(linear8, (rows_x, rows_w, bias, dtype)),
    ]
    return {call.op.name: call for call in listed}


def _window(bench: Bench, dtype: torch.dtype) -> dict[str, Call]:
    """One layer's slots at a chunk's end. The advance turns keys where they are, which can be done
    again and again; slots that move are timed with the baseline's."""
    dit, cache = bench.preset.dit, bench.preset.cache
    tail = (dit.num_heads, dit.head_dim)

    def slots(salt: int, frames: int) -> Tensor:
        return drawn(bench, dtype, salt, 1, 1, frames * dit.tokens_per_frame, *tail)

    held = cache.local_frames
    advanced = [slots(n, held) for n in (11, 12, 13)]
    found = {"advance": Call(chunk_advance, (*advanced, _rope(bench, held), 0), advanced[1])}
    if cache.memory_frames:
        k, v = (slots(n, cache.memory_frames)[0] for n in (14, 15))
        keys, values = (slots(n, cache.memory_frames) for n in (16, 17))
        at = _rope(bench, cache.memory_frames)
        found["memory"] = Call(place_memory, (k, v, at, keys, values), keys)
    return found


def _decoder(bench: Bench, dtype: torch.dtype) -> dict[str, Call]:
    """A latent's pictures at the last level of Wan's decoder, where they are largest."""
    dit, shapes = bench.preset.dit, (bench.preset.codec, bench.preset.small_codec)
    channels = next((s.dim for s in shapes if isinstance(s, WanVaeShape)), _DRY_WIDTH)
    height, width = 8 * dit.latent_height, 8 * dit.latent_width
    if bench.dry:
        height = width = _DRY_SIDE
    x = drawn(bench, dtype, 18, 1, channels, _PICTURES, height, width)
    past = drawn(bench, dtype, 19, 1, channels, _PAST, height, width)
    x, past = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, past))
    joined = (x, drawn(bench, dtype, 20, channels), past, torch.empty_like(past))
    video = drawn(bench, dtype, 21, _PICTURES, 3, height, width).sigmoid()
    return {"join": Call(norm_silu_join, joined), "pixels": Call(frames_to_uint8, (video,))}


def _rope(bench: Bench, frames: int) -> Tensor:
    dit = bench.preset.dit
    rope = FrameRope(dit.grid_height, dit.grid_width, dit.head_dim, str(bench.device))
    return rope.table(range(frames))


def drawn(bench: Bench, dtype: torch.dtype, salt: int, *size: int) -> Tensor:
    """Normal numbers of the model's kind, as `dtype`: in every one the same values."""
    generator = torch.Generator(bench.device).manual_seed(bench.seed + salt)
    values = torch.randn(size, generator=generator, device=bench.device)
    return values.to(bench.dtype).to(dtype)
