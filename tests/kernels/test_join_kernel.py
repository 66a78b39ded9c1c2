"""The kernel before a causal convolution against its truth: every frame count, in place and not."""

from __future__ import annotations

import pytest
import torch
from kernel_rig import DEVICE, KINDS, guards_hold, near, normal
from torch import Tensor

from echo_kernels import norm_silu_join

pytestmark = pytest.mark.usefixtures("triton")

STEPS = 8
LAST = torch.channels_last_3d
# Batch, channels, new frames, height, width: blocks that are not filled, and one that is.
SHAPES = [
    (1, 1, 1, 1, 1), (2, 6, 1, 3, 5), (2, 5, 2, 4, 3), (1, 96, 4, 5, 7), (1, 384, 1, 3, 3),
    (1, 256, 2, 4, 4),
]  # fmt: skip


def frames(seed: int, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
    """As activations lie on a device: channels are neighbours. Between guards."""
    batch, channels, count, height, width = shape
    return normal(seed, batch, count, height, width, channels, kind=kind).permute(0, 4, 1, 2, 3)


def pasts(seed: int, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
    return frames(seed, (*shape[:2], 2, *shape[3:]), kind)


def agree(found: Tensor, kept: Tensor, true: Tensor, true_kept: Tensor) -> bool:
    """The past is moved, not computed: its bits are the truth's."""
    exact = torch.equal(found[:, :, :2], true[:, :, :2])
    return exact and near(found, true, STEPS) and near(kept, true_kept, STEPS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_past", [True, False])
def test_the_input_and_the_next_past(
    shape: tuple[int, ...], kind: torch.dtype, has_past: bool
) -> None:
    x, gain = frames(1, shape, kind), normal(2, shape[1], kind=kind)
    past = pasts(3, shape, kind) if has_past else None
    kept, true_kept = pasts(4, shape, kind), pasts(4, shape, kind)
    before = None if past is None else past.clone()
    found = norm_silu_join.kernel(x, gain, past, kept)
    true = norm_silu_join.truth(x, gain, past, true_kept)
    assert agree(found, kept, true, true_kept)
    assert torch.equal(kept, found[:, :, -2:])
    assert found.is_contiguous(memory_format=LAST)
    assert guards_hold(kept)
    if past is not None and before is not None:
        assert torch.equal(past, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_past_that_makes_room_for_the_next(shape: tuple[int, ...], kind: torch.dtype) -> None:
    x, gain = frames(5, shape, kind), normal(6, shape[1], kind=kind)
    kept, true_kept = pasts(7, shape, kind), pasts(7, shape, kind)
    found = norm_silu_join.kernel(x, gain, kept, kept)
    true = norm_silu_join.truth(x, gain, true_kept, true_kept)
    assert agree(found, kept, true, true_kept)
    assert torch.equal(kept, found[:, :, -2:])
    assert guards_hold(kept)


def test_other_layouts_give_the_same() -> None:
    shape = (2, 6, 3, 2, 5)
    x, gain = frames(8, shape, torch.float32), normal(9, 6)
    past, kept = pasts(10, shape, torch.float32), pasts(11, shape, torch.float32)
    expected = norm_silu_join.kernel(x, gain, past, kept)
    plain = torch.empty(2, 6, 2, 2, 5, device=DEVICE)
    found = norm_silu_join.kernel(x.contiguous(), gain, past.contiguous(), plain)
    assert torch.equal(found, expected)
    assert torch.equal(plain, kept)


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_without_any_signal_stays_silent(kind: torch.dtype) -> None:
    """A length of 0 is where a division by it would show."""
    x, gain = frames(12, (1, 6, 1, 1, 2), kind), normal(13, 6, kind=kind)
    x[..., 0] = 0
    found = norm_silu_join.kernel(x, gain, None, pasts(14, (1, 6, 1, 1, 2), kind))
    assert not found[:, :, 2, :, 0].any()
    assert bool(found[:, :, 2, :, 1].all())
