"""How a model's modules compute: whose attention they call. Set once, before they are used."""

from __future__ import annotations

from dataclasses import dataclass

from echo_ray.model.attention import CrossAttention, SelfAttention
from echo_ray.model.backends import PLAIN, Attention
from echo_ray.model.dit import DiT
from echo_ray.model.memory import EncoderLayer, MemoryEncoder


@dataclass(frozen=True, slots=True)
class Computing:
    """What decides a model's bits beside its weights, the device and the code."""

    attention: str = PLAIN.label

    def __str__(self) -> str:
        return "" if self == Computing() else self.attention


def use(dit: DiT, memory: MemoryEncoder | None, attention: Attention) -> Computing:
    """Let every attention of a model be this one; what that makes of its numerics."""
    for part in (dit, memory):
        for module in part.modules() if part is not None else ():
            if isinstance(module, SelfAttention | CrossAttention | EncoderLayer):
                module.attend = attention.attend
    return Computing(attention.label)
