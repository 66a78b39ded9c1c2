"""Attention, its norms, and the seam through which a forward pass meets a cache.

Shapes: B batch, N query tokens, M key tokens, H heads, D head size, C = H * D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from echo_kernels import Slots, qk_norm_rope_write, rms_norm
from echo_ray.model.linear8 import Activation

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What computes attention: q [B, N, H, D], k and v [B, M, H, D] to [B, N, C]."""


class KVCall(Protocol):
    """One forward pass's view of the cache: where queries stand and which keys they see.

    The transformer knows nothing about eviction or positions; it writes each layer's new keys and
    values where it is told, and attends to what it is shown.
    """

    def slots(self, layer: int) -> Slots:
        """Where a layer's keys and values go, and all that its queries see afterwards."""
        ...


class RMSNorm(nn.Module):
    """x / rms(x), computed in float32 and cast back before the weight is applied."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def weight_of(norm: nn.Module) -> Tensor | None:
    """An RMSNorm's weight; none where a model has no norm."""
    return norm.weight if isinstance(norm, RMSNorm) else None


def split_heads(x_BNC: Tensor, heads: int) -> Tensor:
    return x_BNC.view(*x_BNC.shape[:-1], heads, -1)


def attention(q_BNHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v over every presented key, no mask; returns [B, N, C]."""
    out_BHND = functional.scaled_dot_product_attention(
        q_BNHD.transpose(1, 2), k_BMHD.transpose(1, 2), v_BMHD.transpose(1, 2)
    )
    return out_BHND.transpose(1, 2).flatten(2)


class QKV(nn.Module):
    """The projections that self- and cross-attention share; norms span the full width."""

    def __init__(self, dim: int, num_heads: int, eps: float, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.eps = eps
        self.attend: Attend = attention
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(dim, eps) if qk_norm else nn.Identity()

    def queries(self, x_BNC: Activation) -> Tensor:
        q: Tensor = self.norm_q(self.q(x_BNC))
        return split_heads(q, self.num_heads)

    def keys_values(self, x_BMC: Tensor) -> tuple[Tensor, Tensor]:
        k: Tensor = self.norm_k(self.k(x_BMC))
        v: Tensor = self.v(x_BMC)
        return split_heads(k, self.num_heads), split_heads(v, self.num_heads)


class SelfAttention(QKV):
    """Attention over the three tiers that the cache presents (spec sections 3 and 4)."""

    def forward(self, x_BNC: Activation, call: KVCall, layer: int) -> Tensor:
        slots = call.slots(layer)
        q_BNHD = qk_norm_rope_write(
            self.q(x_BNC), self.k(x_BNC), self.v(x_BNC),
            weight_of(self.norm_q), weight_of(self.norm_k), self.eps, slots,
        )  # fmt: skip
        out: Tensor = self.o(self.attend(q_BNHD, slots.seen_keys_BMHD, slots.seen_values_BMHD))
        return out

    def write(self, x_BNC: Activation, call: KVCall, layer: int) -> None:
        """Leave keys and values behind as `forward` does, attending to nothing."""
        k_BNC = self.k(x_BNC)
        # The op turns queries too: the keys stand in for them, and what comes of that is dropped.
        qk_norm_rope_write(
            k_BNC, k_BNC, self.v(x_BNC), None, weight_of(self.norm_k), self.eps, call.slots(layer)
        )


class CrossAttention(QKV):
    """Attention over a prompt's keys and values, computed once per prompt; no rope, no mask."""

    def forward(self, x_BNC: Activation, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
        out: Tensor = self.o(self.attend(self.queries(x_BNC), k_BMHD, v_BMHD))
        return out
