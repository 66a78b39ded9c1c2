"""A LoRA added into the transformer's weights: W + (alpha / rank) B A, one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from echo_ray.errors import WeightsError
from echo_ray.weights.wording import counted

LINEARS = (
    *(f"self_attn.{name}" for name in "qkvo"),
    *(f"cross_attn.{name}" for name in "qkvo"),
    "ffn.0",
    "ffn.2",
)
"""What a published adapter changes in every block, and nothing else."""
_TARGET = re.compile(rf"blocks\.\d+\.(?:{'|'.join(map(re.escape, LINEARS))})\.weight")
_KEY = re.compile(
    r"(?:base_model\.)?(?:model\.|module\.)*(?P<linear>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two factors of one change: A [rank, in] and B [out, rank]."""

    a: Tensor
    b: Tensor
    scale: float


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The weight with its change, in float32 whatever the inputs are."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)


def apply_lora(
    dit: Mapping[str, Tensor], lora: Mapping[str, Tensor], alpha: float | None = None
) -> dict[str, Tensor]:
    """The transformer's tensors with the adapter merged in, each in the dtype it had."""
    shapes = {key: tuple(value.shape) for key, value in dit.items()}
    pairs = lora_pairs(shapes, lora, alpha, "LoRA")
    return {
        key: value if key not in pairs else merge_into(value, pairs[key])().to(value.dtype)
        for key, value in dit.items()
    }


def merge_into(weight: Tensor, pair: Pair) -> Callable[[], Tensor]:
    """What computes the merged weight when it is wanted."""
    return lambda: merged(weight, pair.a, pair.b, pair.scale)


def lora_pairs(
    shapes: Mapping[str, tuple[int, ...]],
    lora: Mapping[str, Tensor],
    alpha: float | None,
    what: str,
) -> dict[str, Pair]:
    """The factors for every linear layer of the blocks, by the key of its weight.

    `shapes` are the transformer's. Raises `WeightsError` unless the adapter is complete, fits and
    holds nothing else.
    """
    if alpha is not None and not alpha > 0:
        raise WeightsError(f"{what}: alpha {alpha:g} is not allowed: more than 0")
    targets = {key for key in shapes if _TARGET.fullmatch(key)}
    sides: dict[str, dict[str, Tensor]] = {}
    surplus: list[str] = []
    for key, value in lora.items():
        match = _KEY.fullmatch(key)
        target = f"{match['linear']}.weight" if match else ""
        if match is None or target not in targets or match["side"] in sides.get(target, {}):
            surplus.append(key)
        else:
            sides.setdefault(target, {})[match["side"]] = value
    missing = [
        f"{target.removesuffix('.weight')}.lora_{side}"
        for target in sorted(targets)
        for side in "AB"
        if side not in sides.get(target, {})
    ]
    misshapen = [said for target in sorted(sides) for said in _unfit(shapes, target, sides[target])]
    ranks = {int(side["A"].shape[0]) for side in sides.values() if "A" in side and side["A"].ndim}
    problems = counted({"missing": missing, "surplus": surplus, "misshapen": misshapen})
    if len(ranks) > 1:
        problems.append(f"different ranks {', '.join(map(str, sorted(ranks)))}")
    said = "; ".join(problems)
    if said or not targets:
        raise WeightsError(f"{what}: does not fit: {said or 'the transformer has no blocks'}")
    rank = ranks.pop()
    scale = 1.0 if alpha is None else alpha / rank
    return {target: Pair(side["A"], side["B"], scale) for target, side in sides.items()}


def rank_of(pairs: Mapping[str, Pair]) -> int:
    return int(next(iter(pairs.values())).a.shape[0])


def _unfit(
    shapes: Mapping[str, tuple[int, ...]], target: str, sides: Mapping[str, Tensor]
) -> list[str]:
    """What is wrong with the shapes of one pair of factors."""
    if sides.keys() != {"A", "B"}:
        return []
    a, b = tuple(sides["A"].shape), tuple(sides["B"].shape)
    out, into = shapes[target]
    if len(a) == len(b) == 2 and a[0] == b[1] and a[0] > 0 and (b[0], a[1]) == (out, into):
        return []
    name = target.removesuffix(".weight")
    return [f"{name} A {a}, B {b} for a weight {(out, into)}"]
