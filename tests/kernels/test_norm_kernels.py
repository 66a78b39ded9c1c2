"""The norms' kernels against their truths, on shapes that fill no block.

Rounding points are the same, sums are not taken in the same order: a difference of a rounding in
float32 may tip one in bfloat16, hence the steps allowed.
"""

from __future__ import annotations

import pytest
import torch
from kernel_rig import KINDS, guarded, guards_hold, near, normal
from torch import Tensor

from echo_kernels import (
    layernorm_modulate,
    memory_gate_blend,
    residual_layernorm,
    residual_modulate,
    rms_norm,
)

pytestmark = pytest.mark.usefixtures("triton")

# Batch, frames, tokens per frame, width.
SHAPES = [(1, 1, 1, 1), (2, 3, 1, 6), (1, 2, 5, 24), (2, 1, 3, 33), (1, 1, 2, 1536)]
EPS = 1e-6
STEPS = 8


def parts(
    seed: int, shape: tuple[int, int, int, int], kind: torch.dtype, count: int
) -> list[Tensor]:
    """Shifts, scales or gates as a block has them: views of one tensor, strides and all."""
    batch, frames, _, width = shape
    return list(normal(seed, batch, frames, count, width, kind=kind).unbind(2))


def stream(seed: int, shape: tuple[int, int, int, int], kind: torch.dtype) -> Tensor:
    batch, frames, tokens, width = shape
    return normal(seed, batch, frames * tokens, width, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_layernorm_modulate(shape: tuple[int, int, int, int], kind: torch.dtype) -> None:
    x = stream(1, shape, kind)
    shift, scale = parts(2, shape, kind, 2)
    found = layernorm_modulate.kernel(x, shift, scale, EPS)
    assert near(found, layernorm_modulate.truth(x, shift, scale, EPS), STEPS)
    assert guards_hold(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, int, int, int], kind: torch.dtype) -> None:
    x, weight = stream(3, shape, kind), normal(4, shape[-1], kind=kind)
    assert near(rms_norm.kernel(x, weight, EPS), rms_norm.truth(x, weight, EPS), STEPS)
    rows = x[0]
    assert near(rms_norm.kernel(rows, weight, EPS), rms_norm.truth(rows, weight, EPS), STEPS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_residual_and_next_norm(
    shape: tuple[int, int, int, int], has_gate: bool, kind: torch.dtype
) -> None:
    x, y = stream(5, shape, kind), stream(6, shape, kind)
    shift, scale, gate = parts(7, shape, kind, 3)
    weight, bias = normal(8, shape[-1], kind=kind), normal(9, shape[-1], kind=kind)
    chosen = gate if has_gate else None
    for op, norm in ((residual_modulate, (shift, scale)), (residual_layernorm, (weight, bias))):
        after, normed = op.kernel(x, y, chosen, *norm, EPS)
        true_after, true_normed = op.truth(x, y, chosen, *norm, EPS)
        assert torch.equal(after, true_after), op.name
        assert near(normed, true_normed, STEPS), op.name
    assert guards_hold(x)
    assert guards_hold(y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (1, 5, 205), (2, 1024)])
def test_memory_gate_blend(shape: tuple[int, ...], kind: torch.dtype) -> None:
    logits, old, candidate = (normal(n, *shape, kind=kind) for n in (10, 11, 12))
    found = memory_gate_blend.kernel(logits, old, candidate)
    assert near(found, memory_gate_blend.truth(logits, old, candidate), 4)


def test_a_gate_that_is_shut_or_open_leaves_one_of_the_two() -> None:
    old, candidate = normal(13, 40), normal(14, 40)
    for logit, expected in ((80.0, old), (-80.0, candidate)):
        logits = guarded(torch.full((40,), logit))
        assert torch.equal(memory_gate_blend.kernel(logits, old, candidate), expected)


def test_rows_with_one_value_only_become_the_shift() -> None:
    """A variance of 0 is where a wrong place for eps shows."""
    x = guarded(torch.full((1, 3, 5), 7.0))
    shift, scale = parts(15, (1, 3, 1, 5), torch.float32, 2)
    assert torch.equal(layernorm_modulate.kernel(x, shift, scale, EPS), shift)
