"""How a model's modules compute: whose attention they call, and in how many bits.

Set once, before a model is used; what it is set to is part of the fingerprint.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import nn

from echo_ray.model.attention import CrossAttention, SelfAttention
from echo_ray.model.attention8 import Rounded, scales_of
from echo_ray.model.backends import PLAIN, Attention
from echo_ray.model.dit import Block, DiT
from echo_ray.model.linear8 import EIGHT, EXACT, Gelu8, Linear8
from echo_ray.model.memory import EncoderLayer, MemoryEncoder


class Precision(StrEnum):
    """What a model's numbers are rounded to beside its own dtype."""

    EXACT = "exact"
    """Nothing."""
    FP8 = "fp8"
    """The blocks' linear layers: all but those of a prompt's keys and values."""
    FP8_ATTENTION8 = "fp8+attention8"
    """And self-attention."""


@dataclass(frozen=True, slots=True)
class Computing:
    """What decides a model's bits beside its weights, the device and the code."""

    attention: str = PLAIN.label
    precision: Precision = Precision.EXACT

    def __str__(self) -> str:
        return "" if self == Computing() else f"{self.attention} {self.precision}"


def use(
    dit: DiT,
    memory: MemoryEncoder | None,
    attention: Attention,
    precision: Precision = Precision.EXACT,
) -> Computing:
    """Let a model with its weights in place compute so; what that makes of its numerics.

    Weights that are rounded are so for good: a model is set to 8 bits once.
    """
    for part in (dit, memory):
        for module in part.modules() if part is not None else ():
            if isinstance(module, SelfAttention | CrossAttention | EncoderLayer):
                module.attend = attention.attend
    if precision is Precision.FP8_ATTENTION8:
        assert attention.attend8 is not None
        for block in dit.all_blocks():
            scales = scales_of(block.self_attn)
            block.self_attn.attend = Rounded(attention.attend8, scales)
    if precision is not Precision.EXACT:
        _round_linears(dit)
    return Computing(attention.label, precision)


def _round_linears(dit: DiT) -> None:
    blocks = dit.all_blocks()
    for block in blocks:
        block.producers = block.next_producers = EIGHT
        for parent, names in _linears_of(block):
            for name in names:
                setattr(parent, name, Linear8(getattr(parent, name)))
        block.ffn[1] = Gelu8()
    # What follows the last block is the head, which stays exact.
    blocks[-1].next_producers = EXACT


def _linears_of(block: Block) -> list[tuple[nn.Module, tuple[str, ...]]]:
    return [
        (block.self_attn, ("q", "k", "v", "o")),
        (block.cross_attn, ("q", "o")),
        (block.ffn, ("0", "2")),
    ]
