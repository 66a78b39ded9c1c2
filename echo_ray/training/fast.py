"""The transformer's own maths arranged for training on a CPU; same modules, same weights.

What serves rotates in float64 and attends through PyTorch's fused attention; both have slow
backward passes on a CPU. Here the rotation is real arithmetic in float32 and the attention is two
products with a softmax between, so that a compiler can fuse what lies around the products.
A test holds it equal to `DiT.forward`.

Shapes: B clips, K copies of each, N tokens of a call, M tokens of the past, H heads, D head size,
P text tokens, C width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from echo_kernels.gated_residual_norm import gated
from echo_kernels.layernorm_modulate import truth as modulate
from echo_ray.model.attention import attention
from echo_ray.model.dit import Block, DiT, PromptKV, TimeCondition

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Past:
    """Keys, not rotated, and values of all before the call: a pair [B, M, H, D] a layer."""

    layers: list[Pair]
    cos_ND: Tensor
    sin_ND: Tensor


def turn(x_BNHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """Turn adjacent pairs of the last axis by angles given as cosine and sine [N, D / 2]."""
    even, odd = x_BNHD.view(*x_BNHD.shape[:-1], -1, 2).unbind(-1)
    cos, sin = cos_ND[:, None], sin_ND[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def attend(q_BNHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
    """Plain attention, [B, N, C]; on a GPU the fused one, which is made for it."""
    if q_BNHD.is_cuda:
        return attention(q_BNHD, k_BMHD, v_BMHD)
    q, k, v = (x.transpose(1, 2) for x in (q_BNHD, k_BMHD, v_BMHD))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (torch.softmax(scores, dim=-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


def block_forward(
    block: Block,
    x_BNC: Tensor,
    e0_BF6C: Tensor,
    prompt: Pair,
    past: Pair | None,
    past_rope: Pair,
    own_rope: Pair,
    copies: int,
    prompts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`Block.forward` over a past of B clips for K * B rows; also returns its keys and values.

    With several prompts a row, each is read by its equal part of the tokens, in order.
    """
    shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation + e0_BF6C).unbind(2)
    h = modulate(x_BNC, shift1, scale1, block.eps)
    attn = block.self_attn
    q = turn(attn.queries(h), *own_rope)
    k, v = attn.keys_values(h)
    all_k, all_v = turn(k, *own_rope), v
    if past is not None:
        past_k = turn(past[0], *past_rope).to(all_k.dtype)
        all_k = torch.cat([past_k.repeat(copies, 1, 1, 1), all_k], dim=1)
        all_v = torch.cat([past[1].to(v.dtype).repeat(copies, 1, 1, 1), v], dim=1)
    x_BNC = x_BNC + gated(attn.o(attend(q, all_k, all_v)), gate1)
    cross = block.cross_attn
    prompt_k, prompt_v = (p.repeat(copies, 1, 1, 1) for p in prompt)
    q = cross.queries(block.norm3(x_BNC))
    asked = q.reshape(prompts * q.shape[0], -1, *q.shape[2:])
    x_BNC = x_BNC + cross.o(attend(asked, prompt_k, prompt_v).view_as(x_BNC))
    h = modulate(x_BNC, shift2, scale2, block.eps)
    return x_BNC + gated(block.ffn(h), gate2), k, v


BlockForward = Callable[..., tuple[Tensor, Tensor, Tensor]]
COMPILED_SHAPES = 64
"""Sizes of the past, gradient modes and models that one run may compile a block for."""


def choose_block(compiled: bool) -> BlockForward:
    """`block_forward`, compiled for every shape that comes or as it is."""
    if not compiled:
        return block_forward
    torch._dynamo.config.cache_size_limit = COMPILED_SHAPES
    return torch.compile(block_forward, dynamic=False)


def dit_forward(
    dit: DiT,
    x_BFCHW: Tensor,
    time: TimeCondition,
    prompt: PromptKV,
    past: Past | None,
    own_rope: Pair,
    copies: int,
    block: BlockForward = block_forward,
    prompts: int = 1,
) -> tuple[Tensor, list[Pair]]:
    """`DiT.forward` for training: the flow, and each layer's keys and values, not rotated."""
    frames = x_BFCHW.shape[1]
    x = dit.patch_embedding(x_BFCHW.transpose(1, 2)).flatten(2).transpose(1, 2).float()
    written: list[Pair] = []
    past_rope = (past.cos_ND, past.sin_ND) if past else own_rope
    for layer, module in enumerate(dit.blocks):
        before = past.layers[layer] if past else None
        x, k, v = block(
            module, x, time.e0_BF6C, prompt.layers[layer], before, past_rope, own_rope,
            copies, prompts,
        )  # fmt: skip
        written.append((k, v))
    return dit._unpatchify(dit.head(x, time.e_BFC), frames), written
