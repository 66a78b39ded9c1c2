"""Triton functions that several kernels call. Everything is float32 unless its name says more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echo_kernels.launch import kernel

if TYPE_CHECKING:
    import triton.language as tl


@kernel
def over_rms(squares: tl.tensor, channels: tl.tensor, eps: tl.tensor) -> tl.tensor:
    """1 / rms of a row with this sum of squares."""
    return tl.rsqrt(squares / channels + eps)


@kernel
def layer_norm(wide: tl.tensor, real: tl.tensor, channels: tl.tensor, eps: tl.tensor) -> tl.tensor:
    """A row with mean 0 and variance 1; places that are not real hold 0 before and after."""
    mean = tl.sum(wide, axis=0) / channels
    centred = tl.where(real, wide - mean, 0.0)
    return centred * over_rms(tl.sum(centred * centred, axis=0), channels, eps)


@kernel
def store_row8(
    out: tl.tensor, scales: tl.tensor, row: tl.tensor, wide: tl.tensor,
    at: tl.tensor, real: tl.tensor, channels: tl.tensor,
) -> None:  # fmt: skip
    """A row as `rows8` writes it; places that are not real hold 0. 448 is e4m3's largest number."""
    largest = tl.maximum(tl.max(tl.abs(wide), axis=0), 1e-12)
    scale = tl.div_rn(largest, 448.0)
    tl.store(scales + row, scale)
    tl.store(out + row * channels + at, tl.div_rn(wide, scale).to(out.dtype.element_ty), mask=real)


@kernel
def load_pairs(row: tl.tensor, pair: tl.tensor, real: tl.tensor) -> tl.tensor:
    """A row's even and odd elements."""
    even = tl.load(row + 2 * pair, mask=real, other=0.0).to(tl.float32)
    odd = tl.load(row + 2 * pair + 1, mask=real, other=0.0).to(tl.float32)
    return even, odd


@kernel
def store_pairs(
    row: tl.tensor, even: tl.tensor, odd: tl.tensor, pair: tl.tensor, real: tl.tensor
) -> None:
    kind = row.dtype.element_ty
    tl.store(row + 2 * pair, even.to(kind), mask=real)
    tl.store(row + 2 * pair + 1, odd.to(kind), mask=real)


@kernel
def normed_pairs(
    row: tl.tensor,
    weight: tl.tensor,
    pair: tl.tensor,
    real: tl.tensor,
    channels: tl.tensor,
    eps: tl.tensor,
    NORM: tl.constexpr,
) -> tl.tensor:
    """A row's even and odd elements, rounded before and after the weight as `rms_norm` does."""
    even, odd = load_pairs(row, pair, real)
    if NORM:
        kind = row.dtype.element_ty
        scale = over_rms(tl.sum(even * even + odd * odd, axis=0), channels, eps)
        weight_even, weight_odd = load_pairs(weight, pair, real)
        even = ((even * scale).to(kind).to(tl.float32) * weight_even).to(kind).to(tl.float32)
        odd = ((odd * scale).to(kind).to(tl.float32) * weight_odd).to(kind).to(tl.float32)
    return even, odd


@kernel
def store_turned(
    row: tl.tensor,
    even: tl.tensor,
    odd: tl.tensor,
    rope: tl.tensor,
    pair: tl.tensor,
    turn: tl.tensor,
    real: tl.tensor,
) -> None:
    """Turn pairs by a token's factors in float64; float32 lies between it and what is stored."""
    cos = tl.load(rope + 2 * turn, mask=real, other=0.0)
    sin = tl.load(rope + 2 * turn + 1, mask=real, other=0.0)
    even, odd = even.to(tl.float64), odd.to(tl.float64)
    turned_even = (even * cos - odd * sin).to(tl.float32)
    turned_odd = (even * sin + odd * cos).to(tl.float32)
    store_pairs(row, turned_even, turned_odd, pair, real)
