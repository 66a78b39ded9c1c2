"""How much of the memory stays: a gate between the old state and its candidate.

Shapes: any, all three the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from echo_kernels.dispatch import Op, expect
from echo_kernels.launch import kernel

if TYPE_CHECKING:
    import triton.language as tl

BLOCK = 1024


def check(logits: Tensor, old: Tensor, candidate: Tensor) -> None:
    expect("memory_gate_blend", "old", old, logits.shape)
    expect("memory_gate_blend", "candidate", candidate, logits.shape)


def truth(logits: Tensor, old: Tensor, candidate: Tensor) -> Tensor:
    """sigmoid(logits) of the old state, the rest of the candidate; every step is rounded."""
    gate = torch.sigmoid(logits)
    return gate * old + (1 - gate) * candidate


@kernel
def memory_gate_blend_kernel(
    logits: tl.tensor,
    old: tl.tensor,
    candidate: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < count
    kind = out.dtype.element_ty
    logit = tl.load(logits + at, mask=real, other=0.0).to(tl.float32)
    gate = (1.0 / (1.0 + tl.exp(-logit))).to(kind).to(tl.float32)
    rest = (1.0 - gate).to(kind).to(tl.float32)
    before = tl.load(old + at, mask=real, other=0.0).to(tl.float32)
    after = tl.load(candidate + at, mask=real, other=0.0).to(tl.float32)
    kept = (gate * before).to(kind).to(tl.float32)
    new = (rest * after).to(kind).to(tl.float32)
    tl.store(out + at, (kept + new).to(kind), mask=real)


def run(logits: Tensor, old: Tensor, candidate: Tensor) -> Tensor:
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    memory_gate_blend_kernel.launch(
        (-(-logits.numel() // BLOCK),),
        logits, old.contiguous(), candidate.contiguous(), out, logits.numel(), BLOCK=BLOCK,
    )  # fmt: skip
    return out


memory_gate_blend = Op("memory_gate_blend", check, truth, run)
