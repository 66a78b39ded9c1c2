"""Self-attention in 8 bits: queries, keys and values are e4m3 with a fixed scale for each head.

Scales follow from the weights, so they are the same for every stream and every token: a key is
rounded the same whether it is new or was held for long. They are powers of two, for e4m3 is a
floating format: what a scale is loose by costs range, and no digit.

Shapes: B batch, N query tokens, M key tokens, H heads, D head size, C = H * D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from echo_kernels import heads8
from echo_ray.model.attention import SelfAttention, weight_of

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of e4m3."""
WEIGHT_SCALE = 256.0
"""Shares of the softmax are from 0 to 1 and use e4m3's range up to here, as FlashAttention 3 has
it; they are summed before they are rounded."""


class Scales(NamedTuple):
    """What one step of e4m3's numbers is worth, a float32 [H] each."""

    q_H: Tensor
    k_H: Tensor
    v_H: Tensor


Attend8 = Callable[[Tensor, Tensor, Tensor, Scales, torch.dtype], Tensor]
"""Attention of e4m3 q [B, N, H, D], k and v [B, M, H, D]; gives [B, N, C] of the dtype asked."""


def plain8(
    q_BNHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, scales: Scales, kind: torch.dtype
) -> Tensor:
    """The truth: products and sums in float32, the softmax's shares rounded to e4m3 between."""
    q, k, v = (x.float().transpose(1, 2) for x in (q_BNHD, k_BMHD, v_BMHD))
    steps_H = scales.q_H * scales.k_H * q.shape[-1] ** -0.5
    scores = (q @ k.mT) * steps_H[:, None, None]
    shares = WEIGHT_SCALE * torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    total = shares.sum(dim=-1, keepdim=True)
    out = (shares.to(E4M3).float() @ v) / total * scales.v_H[:, None, None]
    return out.to(kind).transpose(1, 2).flatten(2)


class Rounded:
    """An `Attend` that rounds to 8 bits first."""

    def __init__(self, attend: Attend8, scales: Scales) -> None:
        self.attend = attend
        self.scales = scales

    def __call__(self, q_BNHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
        rounded = [heads8(x, s) for x, s in zip((q_BNHD, k_BMHD, v_BMHD), self.scales, strict=True)]
        q, k, v = rounded
        return self.attend(q, k, v, self.scales, q_BNHD.dtype)


def scales_of(layer: SelfAttention) -> Scales:
    """From a layer's exact weights: what its queries, keys and values cannot get past.

    A row of unit variance has length √C: a norm's weight lets no number of it past √C times
    itself, nor can a pair's rotation, and a linear layer lets none past √C times the length of its
    row. Rows are modulated before values are made of them, and the memory has projections of its
    own, so that a few numbers may lie beyond: those become the largest there is.
    """
    pairs = ((layer.q, layer.norm_q), (layer.k, layer.norm_k), (layer.v, None))
    return Scales(*(_scale(linear, norm, layer.num_heads) for linear, norm in pairs))


def _scale(linear: nn.Linear, norm: nn.Module | None, heads: int) -> Tensor:
    weight_C = None if norm is None else weight_of(norm)
    reach_C = linear.weight.float().norm(dim=1) if weight_C is None else weight_C.float().abs()
    reach_H = linear.in_features**0.5 * reach_C.view(heads, -1).amax(dim=1).clamp(min=1e-12)
    # In float64 a power of two is exact on every device.
    return torch.exp2(torch.log2(reach_H.double() / LARGEST).ceil()).float()
