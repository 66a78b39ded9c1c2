"""The truths against the formulas of the specification, written out once more: bit for bit.

These were the engine's own lines before it called the kernels, so they also say that no bit of a
stream has changed.
"""

from __future__ import annotations

import pytest
import torch
from kernel_rig import KINDS
from torch import Tensor
from torch.nn import functional

import echo_kernels
from echo_kernels import Slots
from echo_ray.model.rope import rope_table

EPS = 1e-6


def normal(seed: int, *shape: int, kind: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(kind)


def turned(x_BNHD: Tensor, table_NP: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x_BNHD.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table_NP[:, None]).flatten(-2).to(x_BNHD.dtype)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    return (x.float() * scale).to(x.dtype) * weight


def modulate(x_BNC: Tensor, shift_BFC: Tensor, scale_BFC: Tensor) -> Tensor:
    h = functional.layer_norm(x_BNC, x_BNC.shape[-1:], eps=EPS)
    h = h.unflatten(1, (shift_BFC.shape[1], -1))
    return (h * (1 + scale_BFC[:, :, None]) + shift_BFC[:, :, None]).flatten(1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_norms(kind: torch.dtype) -> None:
    x, y = normal(1, 2, 6, 24, kind=kind), normal(2, 2, 6, 24, kind=kind)
    shift, scale, gate = normal(3, 2, 3, 3, 24, kind=kind).unbind(2)
    weight, bias = normal(4, 24, kind=kind), normal(5, 24, kind=kind)
    assert torch.equal(echo_kernels.rms_norm(x, weight, EPS), rms(x, weight))
    found = echo_kernels.layernorm_modulate(x, shift, scale, EPS)
    assert torch.equal(found, modulate(x, shift, scale))
    for chosen in (gate, None):
        branch = y if chosen is None else y * chosen.repeat_interleave(2, dim=1)
        after, normed = echo_kernels.residual_modulate(x, y, chosen, shift, scale, EPS)
        assert torch.equal(after, x + branch)
        assert torch.equal(normed, modulate(x + branch, shift, scale))
        after, normed = echo_kernels.residual_layernorm(x, y, chosen, weight, bias, EPS)
        assert torch.equal(after, x + branch)
        assert torch.equal(normed, functional.layer_norm(after, (24,), weight, bias, EPS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_causal_convolutions_input(count: int, kind: torch.dtype) -> None:
    x, gain = normal(18, 2, 6, count, 3, 5, kind=kind), normal(19, 6, kind=kind)
    past, kept = normal(20, 2, 6, 2, 3, 5, kind=kind), torch.full((2, 6, 2, 3, 5), torch.nan)
    kept = kept.to(kind)
    scaled = functional.normalize(x, dim=1) * (6**0.5) * gain[:, None, None, None]
    expected = torch.cat([past, functional.silu(scaled)], dim=2)
    assert torch.equal(echo_kernels.norm_silu_join(x, gain, past, kept), expected)
    assert torch.equal(kept, expected[:, :, -2:])
    assert torch.equal(echo_kernels.norm_silu_join(x, gain, past, past), expected)
    assert torch.equal(past, kept)
    unseen = echo_kernels.norm_silu_join(x, gain, None, kept)
    assert not unseen[:, :, :2].any()
    assert torch.equal(unseen[:, :, 2:], expected[:, :, 2:])


@pytest.mark.parametrize("kind", KINDS)
def test_the_gate_rounds_after_every_step(kind: torch.dtype) -> None:
    logits, old, new = (normal(n, 2, 5, 24, kind=kind) for n in (6, 7, 8))
    gate = torch.sigmoid(logits)
    expected = gate * old + (1 - gate) * new
    assert torch.equal(echo_kernels.memory_gate_blend(logits, old, new), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_frames(kind: torch.dtype) -> None:
    video = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(9)).to(kind)
    expected = (video.permute(0, 2, 3, 1) * 255.0).round().to(torch.uint8)
    assert torch.equal(echo_kernels.frames_to_uint8(video), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("written", [8, 4, 0])
def test_a_calls_slots(kind: torch.dtype, written: int) -> None:
    """Two frames of 2 x 2 tokens, of which the last `written` tokens have slots."""
    q, k, v = (normal(n, 2, 8, 12, kind=kind) for n in (10, 11, 12))
    weights = normal(13, 12, kind=kind), normal(14, 12, kind=kind)
    rope = rope_table((18, 19), 2, 2, 6, "cpu")
    window = torch.full((3, 2, 9, 2, 6), torch.nan, dtype=kind)
    raw, keys, values = (part[:, 1 : 1 + written] for part in window)
    slots = Slots(rope, rope[8 - written :], raw, keys, values, keys, values)
    out = echo_kernels.qk_norm_rope_write(q, k, v, *weights, EPS, slots)
    assert torch.equal(out, turned(rms(q, weights[0]).unflatten(-1, (2, 6)), rope))
    normed = rms(k, weights[1]).unflatten(-1, (2, 6))
    last = slice(8 - written, 8)
    assert torch.equal(raw, normed[:, last])
    assert torch.equal(keys, turned(normed, rope)[:, last])
    assert torch.equal(values, v.unflatten(-1, (2, 6))[:, last])
    assert int(window.isnan().sum()) == 3 * 2 * (9 - written) * 12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gone", [0, 1, 2, 3, 7])
def test_a_window_moves_up(kind: torch.dtype, gone: int) -> None:
    before = normal(15, 3, 2, 2, 7, 2, 6, kind=kind)
    raw, keys, values = before.clone()
    rope = rope_table(tuple(range(7 - gone)), 1, 1, 6, "cpu") if gone < 7 else raw.new_zeros(0, 3)
    echo_kernels.chunk_advance(raw, keys, values, rope.to(torch.complex128), gone)
    kept = slice(0, 7 - gone)
    assert torch.equal(raw[:, :, kept], before[0][:, :, gone:])
    assert torch.equal(values[:, :, kept], before[2][:, :, gone:])
    for layer in range(2):
        expected = turned(before[0][layer, :, gone:], rope) if gone < 7 else raw[layer, :, kept]
        assert torch.equal(keys[layer, :, kept], expected)
    for part, old in zip((raw, keys, values), before, strict=True):
        assert torch.equal(part[:, :, 7 - gone :], old[:, :, 7 - gone :])


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_gets_the_memory(kind: torch.dtype) -> None:
    k, v = normal(16, 2, 4, 2, 6, kind=kind), normal(17, 2, 4, 2, 6, kind=kind)
    rope = rope_table((9,), 2, 2, 6, "cpu")
    keys, values = torch.zeros(2, 3, 2, 4, 2, 6, dtype=kind)
    echo_kernels.place_memory(k, v, rope, keys, values)
    for layer in range(3):
        assert torch.equal(keys[layer], turned(k, rope))
        assert torch.equal(values[layer], v)
