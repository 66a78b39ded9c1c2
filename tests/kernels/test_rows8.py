"""Rows and heads in 8 bits: truths against their formulas, kernels against truths."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_rig import DEVICE, KINDS, guarded, guards_hold, near, normal
from torch import Tensor

from echo_kernels import (
    Rows8,
    gelu_rows8,
    heads8,
    layernorm_modulate,
    layernorm_modulate8,
    linear8,
    residual_layernorm,
    residual_layernorm8,
    residual_modulate,
    residual_modulate8,
    rows8,
)

E4M3 = torch.float8_e4m3fn
EPS = 1e-6
# Batch, frames, tokens per frame, width.
SHAPES = [(1, 1, 1, 1), (2, 3, 1, 6), (1, 2, 5, 33), (1, 1, 2, 1536)]
LEVELS = sorted({float(v) for v in torch.arange(127, dtype=torch.uint8).view(E4M3)})
"""Every number of e4m3 that is not negative."""


def nearest(x: float) -> float:
    """Of e4m3, ties to the even one, found by looking at all."""
    size = abs(x)
    far = [abs(level - size) for level in LEVELS]
    best = min(far)
    found = [i for i, d in enumerate(far) if d == best]
    return math.copysign(LEVELS[next((i for i in found if i % 2 == 0), found[0])], x)


def steps_apart(found: Tensor, true: Tensor) -> Tensor:
    """How many numbers of e4m3 lie between; codes of one sign count up with their size."""
    a, b = (t.view(torch.uint8).int() for t in (found, true))
    return ((a & 127) * (1 - (a >> 7) * 2) - (b & 127) * (1 - (b >> 7) * 2)).abs()


def alike(found: Rows8, true: Rows8, kind: torch.dtype) -> bool:
    """Scales are near, and in bfloat16 seldom differ; where they are equal, one number in fifty
    may have tipped to the next."""
    assert (found.values.dtype, found.scales.dtype) == (E4M3, torch.float32)
    assert found.values.shape == true.values.shape
    assert found.scales.shape == true.scales.shape
    # A row's largest number may have tipped to the next of its kind.
    near_enough = {torch.float32: 16 * 2**-23, torch.bfloat16: 2**-7}[kind]
    if not torch.allclose(found.scales, true.scales, rtol=near_enough, atol=0.0):
        return False
    moved = int((found.scales != true.scales).sum())
    if kind is torch.bfloat16 and moved > 1 + true.scales.numel() // 10:
        return False
    apart = steps_apart(found.values, true.values)
    same = (found.scales == true.scales).expand_as(apart)
    tipped = int((apart[same] > 0).sum())
    return int(apart.max()) <= 1 and tipped <= 1 + int(same.sum()) // 50


def parts(seed: int, shape: tuple[int, ...], kind: torch.dtype, count: int) -> list[Tensor]:
    batch, frames, _, width = shape
    return list(normal(seed, batch, frames, count, width, kind=kind).unbind(2))


def stream(seed: int, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
    batch, frames, tokens, width = shape
    return normal(seed, batch, frames * tokens, width, kind=kind)


def test_a_row_is_its_numbers_over_its_largest() -> None:
    x = torch.tensor([[3.0, -7.0, 0.013, 0.0], [0.0, 0.0, 0.0, 0.0], [1e-20, 2e-20, 0.0, 0.0]])
    values, scales = rows8.truth(x)
    expected = torch.tensor([[7.0 / 448], [1e-12 / 448], [1e-12 / 448]])
    assert torch.equal(scales, expected)
    wanted = [[nearest(v / (7.0 / 448)) for v in (3.0, -7.0, 0.013, 0.0)], [0.0] * 4, [0.0] * 4]
    assert values.float().tolist() == wanted
    assert values.float()[0, 1] == -448


def test_nothing_that_is_no_number_is_hidden() -> None:
    for bad in (math.nan, math.inf):
        assert bool(rows8.truth(torch.tensor([[1.0, bad]])).values.float().isnan().any())
        heads = heads8.truth(torch.full((1, 1, 1, 2), bad), torch.ones(1)).float()
        assert bool(heads.isnan().all()) if math.isnan(bad) else heads.tolist() == [[[[448.0] * 2]]]


def test_fused_truths_are_the_exact_ones_in_8_bits() -> None:
    for kind in KINDS:
        shape = (2, 3, 2, 10)
        x, y = stream(1, shape, kind), stream(2, shape, kind)
        shift, scale, gate = parts(3, shape, kind, 3)
        weight, bias = normal(4, 10, kind=kind), normal(5, 10, kind=kind)
        pairs = [
            (layernorm_modulate8.truth(x, shift, scale, EPS),
             layernorm_modulate.truth(x, shift, scale, EPS)),
            (gelu_rows8.truth(x), torch.nn.functional.gelu(x, approximate="tanh")),
        ]  # fmt: skip
        for eight, exact, norm in (
            (residual_modulate8, residual_modulate, (shift, scale)),
            (residual_layernorm8, residual_layernorm, (weight, bias)),
        ):
            after, rows = eight.truth(x, y, gate, *norm, EPS)
            true_after, true_rows = exact.truth(x, y, gate, *norm, EPS)
            assert torch.equal(after, true_after)
            pairs.append((rows, true_rows))
        for rows, plain in pairs:
            expected = rows8.truth(plain)
            assert torch.equal(rows.values.view(torch.uint8), expected.values.view(torch.uint8))
            assert torch.equal(rows.scales, expected.scales)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_linear_of_rows(has_bias: bool, kind: torch.dtype) -> None:
    x, weight = normal(6, 2, 3, 48), normal(7, 32, 48)
    bias = normal(8, 32, kind=kind) if has_bias else None
    rows, columns = rows8.truth(x), rows8.truth(weight)
    found = linear8.truth(rows, columns, bias, kind)
    wide = [(part.values.double() * part.scales.double()) for part in (rows, columns)]
    expected = wide[0] @ wide[1].T + (0 if bias is None else bias.double())
    assert (found.dtype, found.shape) == (kind, (2, 3, 32))
    assert near(found, expected.to(kind), 8)
    plain = x @ weight.T + (0 if bias is None else bias.float())
    distance = float((found.float() - plain).norm() / plain.norm())
    assert 0.005 < distance < 0.06


def test_pytorchs_own_product_is_that_linear() -> None:
    """The form for devices, as far as a CPU has it: which axis a scale belongs to, and the bias."""
    x, weight, bias = normal(9, 2, 3, 48), normal(10, 32, 48), normal(11, 32)
    rows, columns = rows8.truth(x), rows8.truth(weight)
    for kind in KINDS:
        found = linear8.kernel(rows, columns, bias.to(kind), kind)
        assert near(found, linear8.truth(rows, columns, bias.to(kind), kind), 16)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 205), (1, 4100)])
def test_rows_and_gelu(shape: tuple[int, ...], kind: torch.dtype) -> None:
    x = normal(12, *shape, kind=kind)
    rows, true = rows8.kernel(x), rows8.truth(x)
    assert torch.equal(rows.values.view(torch.uint8), true.values.view(torch.uint8))
    assert torch.equal(rows.scales, true.scales)
    assert alike(gelu_rows8.kernel(x), gelu_rows8.truth(x), kind)
    assert guards_hold(x)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_give_rows(shape: tuple[int, ...], kind: torch.dtype) -> None:
    x, y = stream(13, shape, kind), stream(14, shape, kind)
    shift, scale, gate = parts(15, shape, kind, 3)
    weight, bias = normal(16, shape[-1], kind=kind), normal(17, shape[-1], kind=kind)
    found = layernorm_modulate8.kernel(x, shift, scale, EPS)
    assert alike(found, layernorm_modulate8.truth(x, shift, scale, EPS), kind)
    for op, norm in ((residual_modulate8, (shift, scale)), (residual_layernorm8, (weight, bias))):
        for chosen in (gate, None):
            after, rows = op.kernel(x, y, chosen, *norm, EPS)
            true_after, true_rows = op.truth(x, y, chosen, *norm, EPS)
            assert torch.equal(after, true_after), op.name
            assert alike(rows, true_rows, kind), op.name
    assert guards_hold(x)
    assert guards_hold(y)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 6), (1, 3, 12, 128)])
def test_heads_of_a_window(shape: tuple[int, int, int, int], kind: torch.dtype) -> None:
    batch, tokens, heads, size = shape
    window = normal(18, batch, tokens + 3, heads, size, kind=kind)
    window[:, 1] *= 1e4
    seen = window[:, 1 : 1 + tokens]
    scales = guarded(2.0 ** torch.arange(-3, heads - 3))
    found, true = heads8.kernel(seen, scales), heads8.truth(seen, scales)
    assert found.is_contiguous()
    assert torch.equal(found.view(torch.uint8), true.view(torch.uint8))
    assert float(true.float().abs().max()) == 448
    nan = torch.full((1, 1, 1, 2), math.nan, device=DEVICE)
    assert bool(heads8.kernel(nan, torch.ones(1, device=DEVICE)).float().isnan().all())
