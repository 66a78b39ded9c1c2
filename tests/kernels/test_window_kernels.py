"""The kernels that write into slots, and that of the frames: bit for bit, and nothing beside."""

from __future__ import annotations

import pytest
import torch
from kernel_rig import DEVICE, KINDS, guarded, guards_hold, near, normal
from torch import Tensor

from echo_kernels import (
    Slots,
    chunk_advance,
    frames_to_uint8,
    place_memory,
    qk_norm_rope_write,
)

pytestmark = pytest.mark.usefixtures("triton")

EPS = 1e-6


def table(seed: int, tokens: int, pairs: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    angles = 7 * torch.rand(tokens, pairs, generator=source, dtype=torch.float64)
    return torch.polar(torch.ones_like(angles), angles).to(DEVICE)


def window(seed: int, *shape: int, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Un-rotated keys, rotated keys, values: [Y, B, slots, H, D], with 0, 2 and 3 slots more."""
    layers, batch, slots, *tail = shape
    raw, keys, values = (
        normal(seed + more, layers, batch, slots + more, *tail, kind=kind) for more in (0, 2, 3)
    )
    return raw, keys, values


def copies(*tensors: Tensor) -> list[Tensor]:
    return [guarded(t) for t in tensors]


# Batch, tokens, of which written, heads, head size.
WRITES = [(1, 1, 1, 1, 2), (2, 5, 5, 3, 6), (2, 5, 3, 2, 10), (1, 4, 0, 2, 4), (1, 3, 2, 12, 128)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("shape", WRITES)
def test_norm_rotation_and_write(
    shape: tuple[int, int, int, int, int], has_norm: bool, kind: torch.dtype
) -> None:
    batch, tokens, written, heads, size = shape
    q, k, v = (normal(n, batch, tokens, heads * size, kind=kind) for n in (1, 2, 3))
    weights = tuple(normal(n, heads * size, kind=kind) if has_norm else None for n in (4, 5))
    ropes = table(6, tokens, size // 2), table(7, written, size // 2)
    outcomes = []
    for form in (qk_norm_rope_write.kernel, qk_norm_rope_write.truth):
        raw, keys, values = window(8, 2, batch, tokens + 3, heads, size, kind=kind)
        at = slice(1, 1 + written)
        slots = Slots(*ropes, raw[1][:, at], keys[1][:, at], values[1][:, at], keys[1], values[1])
        outcomes.append((form(q, k, v, *weights, EPS, slots), raw, keys, values))
        assert all(guards_hold(t) for t in (raw, keys, values))
    (out, raw, keys, values), (true_out, true_raw, true_keys, true_values) = outcomes
    assert torch.equal(values, true_values)
    if has_norm:
        # Sums of squares are not taken in the same order.
        for found, true in ((out, true_out), (raw, true_raw), (keys, true_keys)):
            assert near(found, true, 8)
        untouched = window(8, 2, batch, tokens + 3, heads, size, kind=kind)[0]
        changed = (raw != untouched).flatten(3).any(-1).nonzero()[:, [0, 2]].unique(dim=0)
        assert changed.tolist() == [[1, 1 + n] for n in range(written)]
    else:
        assert torch.equal(out, true_out)
        assert torch.equal(raw, true_raw)
        assert torch.equal(keys, true_keys)


# Layers, batch, slots, heads, head size; slots that leave.
MOVES = [
    ((1, 1, 2, 1, 2), 1),
    ((2, 2, 7, 3, 6), 2),
    ((3, 1, 9, 2, 4), 3),
    ((1, 2, 5, 2, 10), 4),
    ((2, 1, 4, 2, 4), 4),
    ((2, 2, 5, 3, 6), 0),
    ((1, 1, 3, 12, 128), 1),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "gone"), MOVES)
def test_chunk_advance(shape: tuple[int, int, int, int, int], gone: int, kind: torch.dtype) -> None:
    held, pairs = shape[2], shape[-1] // 2
    before = window(20, *shape, kind=kind)
    outcomes = []
    for form in (chunk_advance.kernel, chunk_advance.truth):
        raw, keys, values = copies(*before)
        form(raw, keys[:, :, 2:], values[:, :, 3:], table(21, held - gone, pairs), gone)
        assert all(guards_hold(t) for t in (raw, keys, values))
        outcomes.append((raw, keys, values))
    for found, true in zip(*outcomes, strict=True):
        assert torch.equal(found, true)
    if 0 < gone < held:
        assert torch.equal(outcomes[0][0][:, :, : held - gone], before[0][:, :, gone:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (3, 2, 5, 3, 6), (2, 1, 2, 12, 128)])
def test_place_memory(shape: tuple[int, int, int, int, int], kind: torch.dtype) -> None:
    layers, batch, tokens, heads, size = shape
    k, v = (normal(n, batch, tokens, heads, size, kind=kind) for n in (30, 31))
    outcomes = []
    for form in (place_memory.kernel, place_memory.truth):
        _, keys, values = window(32, layers, batch, tokens + 3, heads, size, kind=kind)
        form(k, v, table(33, tokens, size // 2), keys[:, :, :tokens], values[:, :, :tokens])
        assert all(guards_hold(t) for t in (keys, values))
        outcomes.append((keys, values))
    for found, true in zip(*outcomes, strict=True):
        assert torch.equal(found, true)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 5, 7), (1, 1, 33, 32), (2, 4, 3, 400)])
def test_frames_to_uint8(shape: tuple[int, ...], kind: torch.dtype) -> None:
    source = torch.Generator().manual_seed(40)
    video = guarded(torch.rand(shape, generator=source).to(kind))
    found = frames_to_uint8.kernel(video)
    assert torch.equal(found, frames_to_uint8.truth(video))
    assert found.is_contiguous()
    assert guards_hold(video)


def test_every_level_and_every_tie_becomes_the_byte_that_it_was() -> None:
    levels = torch.arange(511, dtype=torch.float32) / 2
    video = guarded((levels / 255).view(1, 1, 7, 73))
    found = frames_to_uint8.kernel(video)
    assert torch.equal(found, frames_to_uint8.truth(video))
    assert found.flatten()[::2].tolist() == list(range(256))
