"""RMSNorm of queries and keys, their rotation, and keys and values into their slots: one pass.

Shapes: B batch, N tokens of a call, K <= N of them that are written, H heads, D head size,
C = H * D width, M tokens presented, P = D / 2 pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from echo_kernels.device import load_pairs, normed_pairs, store_pairs, store_turned
from echo_kernels.dispatch import Op, expect
from echo_kernels.launch import block_of, kernel
from echo_kernels.rms_norm import truth as normed
from echo_kernels.rotate import check_slots, parts_of, rotate

if TYPE_CHECKING:
    import triton.language as tl


@dataclass(frozen=True, slots=True)
class Slots:
    """Where one layer's queries stand in a call, where its keys and values go, what it sees."""

    query_rope_NP: Tensor
    key_rope_KP: Tensor
    raw_BKHD: Tensor
    """Takes the keys before their rotation, of the call's last K tokens; the others' are lost."""
    keys_BKHD: Tensor
    values_BKHD: Tensor
    seen_keys_BMHD: Tensor
    """All that is attended to once the call's own are written."""
    seen_values_BMHD: Tensor


def check(
    q_BNC: Tensor,
    k_BNC: Tensor,
    v_BNC: Tensor,
    weight_q_C: Tensor | None,
    weight_k_C: Tensor | None,
    eps: float,
    slots: Slots,
) -> None:
    op, into = "qk_norm_rope_write", slots.raw_BKHD
    batch, tokens, channels = q_BNC.shape
    _, written, heads, size = into.shape
    expect(op, "k", k_BNC, q_BNC.shape)
    expect(op, "v", v_BNC, q_BNC.shape)
    if heads * size != channels or written > tokens:
        raise ValueError(
            f"{op}: slots are {list(into.shape)} for queries {list(q_BNC.shape)}; give "
            f"[{batch}, at most {tokens}, H, D] with H * D = {channels}"
        )
    for name in ("raw_BKHD", "keys_BKHD", "values_BKHD"):
        part = getattr(slots, name)
        expect(op, name, part, (batch, written, heads, size))
        check_slots(op, name, part)
    expect(op, "query_rope", slots.query_rope_NP, (tokens, size // 2))
    expect(op, "key_rope", slots.key_rope_KP, (written, size // 2))
    for name, weight in (("weight_q", weight_q_C), ("weight_k", weight_k_C)):
        if weight is not None:
            expect(op, name, weight, (channels,))


def truth(
    q_BNC: Tensor,
    k_BNC: Tensor,
    v_BNC: Tensor,
    weight_q_C: Tensor | None,
    weight_k_C: Tensor | None,
    eps: float,
    slots: Slots,
) -> Tensor:
    """Rotated queries [B, N, H, D]; norms span the full width and are left out without a weight."""
    heads = slots.raw_BKHD.shape[2:]
    q_BNC = q_BNC if weight_q_C is None else normed(q_BNC, weight_q_C, eps)
    k_BNC = k_BNC if weight_k_C is None else normed(k_BNC, weight_k_C, eps)
    dropped = k_BNC.shape[1] - slots.raw_BKHD.shape[1]
    k_BKHD = k_BNC[:, dropped:].view(slots.raw_BKHD.shape)
    slots.raw_BKHD.copy_(k_BKHD)
    slots.keys_BKHD.copy_(rotate(k_BKHD, slots.key_rope_KP))
    slots.values_BKHD.copy_(v_BNC[:, dropped:].view(slots.raw_BKHD.shape))
    return rotate(q_BNC.view(*q_BNC.shape[:2], *heads), slots.query_rope_NP)


@kernel
def qk_norm_rope_write_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, weight_q: tl.tensor, weight_k: tl.tensor,
    query_rope: tl.tensor, key_rope: tl.tensor,
    out: tl.tensor, raw: tl.tensor, keys: tl.tensor, values: tl.tensor,
    tokens: tl.tensor, dropped: tl.tensor, channels: tl.tensor, pairs: tl.tensor,
    raw_b: tl.tensor, keys_b: tl.tensor, values_b: tl.tensor, eps: tl.tensor,
    NORM_Q: tl.constexpr, NORM_K: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch = row // tokens
    token = row % tokens
    slot = token - dropped
    pair = tl.arange(0, BLOCK)
    real = pair < channels // 2
    turn = pair % pairs
    if tl.program_id(1) == 0:
        even, odd = normed_pairs(q + row * channels, weight_q, pair, real, channels, eps, NORM_Q)
        rope = query_rope + token * pairs * 2
        store_turned(out + row * channels, even, odd, rope, pair, turn, real)
    elif slot >= 0:
        even, odd = normed_pairs(k + row * channels, weight_k, pair, real, channels, eps, NORM_K)
        store_pairs(raw + batch * raw_b + slot * channels, even, odd, pair, real)
        rope = key_rope + slot * pairs * 2
        store_turned(keys + batch * keys_b + slot * channels, even, odd, rope, pair, turn, real)
        even, odd = load_pairs(v + row * channels, pair, real)
        store_pairs(values + batch * values_b + slot * channels, even, odd, pair, real)


def run(
    q_BNC: Tensor,
    k_BNC: Tensor,
    v_BNC: Tensor,
    weight_q_C: Tensor | None,
    weight_k_C: Tensor | None,
    eps: float,
    slots: Slots,
) -> Tensor:
    q, k, v = q_BNC.contiguous(), k_BNC.contiguous(), v_BNC.contiguous()
    batch, tokens, channels = q.shape
    _, written, heads, size = slots.raw_BKHD.shape
    out = torch.empty_like(q)
    # Never read without a norm; Triton wants some pointer.
    weight_q, weight_k = (q if w is None else w.contiguous() for w in (weight_q_C, weight_k_C))
    qk_norm_rope_write_kernel.launch(
        (batch * tokens, 2),
        q, k, v, weight_q, weight_k, parts_of(slots.query_rope_NP), parts_of(slots.key_rope_KP),
        out, slots.raw_BKHD, slots.keys_BKHD, slots.values_BKHD,
        tokens, tokens - written, channels, size // 2,
        slots.raw_BKHD.stride(0), slots.keys_BKHD.stride(0), slots.values_BKHD.stride(0),
        eps, NORM_Q=weight_q_C is not None, NORM_K=weight_k_C is not None,
        BLOCK=block_of(channels // 2),
    )  # fmt: skip
    return out.view(batch, tokens, heads, size)


qk_norm_rope_write = Op("qk_norm_rope_write", check, truth, run)
