"""The umT5 text encoder: token ids to the rows that the transformer's cross-attention reads.

A pre-norm encoder with T5's habits (spec section 10): logits are not scaled, positions act only
through a bias that every layer looks up for the distance from query to key, norms have no mean and
no offset. Module names are the published checkpoint's keys. It knows nothing about text: ids come
from `PromptTokenizer`.

Shapes: B batch, L tokens, C width (the transformer's text_dim), H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from echo_ray.errors import WeightsError
from echo_ray.model.attention import RMSNorm, split_heads
from echo_ray.preset import UMT5Shape


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """Buckets [2 * length - 1] of the distances key - query from 1 - length to length - 1.

    Half of the buckets belong to keys behind the query. Of each half one half holds a single
    distance per bucket, the other grows with the logarithm up to `max_distance`. Boundaries are
    found in integers, so that no device's logarithm can move them.
    """
    half = num_buckets // 2
    exact = half // 2
    grown = half - exact
    starts = list(range(1, exact + 1))
    for step in range(1, grown):
        # The smallest n with log(n / exact) / log(max_distance / exact) * grown >= step.
        limit = max_distance**step * exact ** (grown - step)
        starts.append(next(n for n in range(exact, max_distance + 1) if n**grown >= limit))
    distances = torch.arange(1 - length, length)
    buckets = torch.bucketize(distances.abs(), torch.tensor(starts), right=True)
    return buckets + half * (distances > 0)


class RelativeBias(nn.Module):
    """One layer's bias per bucket and head."""

    def __init__(self, shape: UMT5Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.num_buckets, shape.num_heads)

    def forward(self, buckets_LL: Tensor) -> Tensor:
        bias_LLH: Tensor = self.embedding(buckets_LL)
        return bias_LLH.permute(2, 0, 1)


class BiasedAttention(nn.Module):
    """Self-attention without 1/√D, with a bias per distance and padding keys masked."""

    def __init__(self, shape: UMT5Shape, dim: int) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.q = nn.Linear(dim, shape.dim_attn, bias=False)
        self.k = nn.Linear(dim, shape.dim_attn, bias=False)
        self.v = nn.Linear(dim, shape.dim_attn, bias=False)
        self.o = nn.Linear(shape.dim_attn, dim, bias=False)

    def forward(self, x_BLC: Tensor, bias_HLL: Tensor, padding_BL: Tensor) -> Tensor:
        q_BHLD, k_BHLD, v_BHLD = (
            split_heads(part(x_BLC), self.num_heads).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        logits_BHLL = q_BHLD @ k_BHLD.transpose(-1, -2) + bias_HLL
        lowest = torch.finfo(logits_BHLL.dtype).min
        logits_BHLL = logits_BHLL.masked_fill(padding_BL[:, None, None], lowest)
        weights_BHLL = fn.softmax(logits_BHLL, dim=-1, dtype=torch.float32).to(x_BLC.dtype)
        out: Tensor = self.o((weights_BHLL @ v_BHLD).transpose(1, 2).flatten(2))
        return out


class GatedFeedForward(nn.Module):
    """fc2(fc1(x) * gelu(gate(x)))."""

    def __init__(self, dim: int, dim_ffn: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, dim_ffn, bias=False), nn.GELU("tanh"))
        self.fc1 = nn.Linear(dim, dim_ffn, bias=False)
        self.fc2 = nn.Linear(dim_ffn, dim, bias=False)

    def forward(self, x_BLC: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x_BLC) * self.gate(x_BLC))
        return out


class UMT5Block(nn.Module):
    """One layer, with a table of relative positions of its own."""

    def __init__(self, shape: UMT5Shape, dim: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim, shape.eps)
        self.attn = BiasedAttention(shape, dim)
        self.norm2 = RMSNorm(dim, shape.eps)
        self.ffn = GatedFeedForward(dim, shape.dim_ffn)
        self.pos_embedding = RelativeBias(shape)

    def forward(self, x_BLC: Tensor, buckets_LL: Tensor, padding_BL: Tensor) -> Tensor:
        x = x_BLC + self.attn(self.norm1(x_BLC), self.pos_embedding(buckets_LL), padding_BL)
        out: Tensor = x + self.ffn(self.norm2(x))
        return out


class UMT5Encoder(nn.Module):
    """Token ids and their mask to prompt rows; rows beyond a prompt's own tokens are zero."""

    def __init__(self, shape: UMT5Shape, dim: int) -> None:
        super().__init__()
        self.shape = shape
        self.dim = dim
        self.token_embedding = nn.Embedding(shape.vocab, dim)
        self.blocks = nn.ModuleList(UMT5Block(shape, dim) for _ in range(shape.num_layers))
        self.norm = RMSNorm(dim, shape.eps)

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        length = ids_BL.shape[1]
        places_L = torch.arange(length, device=ids_BL.device)
        buckets = relative_buckets(length, self.shape.num_buckets, self.shape.max_distance)
        distances_LL = places_L[None, :] - places_L[:, None]
        buckets_LL = buckets.to(ids_BL.device)[distances_LL + length - 1]
        padding_BL = mask_BL == 0
        x_BLC: Tensor = self.token_embedding(ids_BL)
        for block in self.blocks:
            x_BLC = block(x_BLC, buckets_LL, padding_BL)
        beyond_BL = places_L >= mask_BL.sum(dim=1, keepdim=True)
        out: Tensor = self.norm(x_BLC)
        return out.masked_fill(beyond_BL[..., None], 0.0)

    def encode_ids(self, ids: Sequence[int], mask: Sequence[int]) -> Tensor:
        """Rows [1, L, C] of one prompt, computed on its own tokens only.

        Padding, which stands behind them, weighs nothing as key and is zero as row, so the result
        is the one of `forward`; a prompt of twenty words costs a fraction of the full length.
        """
        count = sum(mask)
        if not 1 <= count <= len(ids):
            raise ValueError(f"{count} true tokens among {len(ids)} ids: needs 1 to {len(ids)}")
        if not 0 <= min(ids) <= max(ids) < self.shape.vocab:
            # On a GPU an id without a row ends the process and every session in it.
            raise WeightsError(
                f"token ids from {min(ids)} to {max(ids)}: the text encoder has the ids 0 to "
                f"{self.shape.vocab - 1}; use the tokenizer of the same model"
            )
        device = self.token_embedding.weight.device
        ids_BL = torch.tensor([ids[:count]], dtype=torch.int64, device=device)
        rows_BLC: Tensor = self(ids_BL, torch.ones_like(ids_BL))
        return fn.pad(rows_BLC, (0, 0, 0, len(ids) - count))
