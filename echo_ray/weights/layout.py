"""Which tensors a preset needs, and what is wrong with those that there are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from echo_ray.errors import ConfigError
from echo_ray.preset import Preset, check_memory_tokens
from echo_ray.weights.parts import build_parts
from echo_ray.weights.wording import counted

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


def expected(preset: Preset) -> dict[str, dict[str, Shape]]:
    """Shape of every tensor of the preset, by part and key. Costs no memory."""
    with torch.device("meta"):
        parts = build_parts(preset)
    return {
        part: {key: tuple(value.shape) for key, value in module.state_dict().items()}
        for part, module in parts.items()
    }


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {key: tuple(value.shape) for key, value in tensors.items()}


def problems(preset: Preset, part: str, wanted: Shapes, found: Shapes) -> list[str]:
    """What is missing, surplus or misshapen in one part, a line for each kind."""
    missing = sorted(wanted.keys() - found.keys())
    surplus = sorted(found.keys() - wanted.keys())
    misshapen = [
        f"{key} {found[key]} for {wanted[key]}"
        for key in sorted(wanted.keys() & found.keys())
        if found[key] != wanted[key]
    ]
    kinds = {"missing": missing, "surplus": surplus, "misshapen": misshapen}
    lines = [f"{part}: {said}" for said in counted(kinds)]
    return lines + _resolution(preset, part, wanted, found)


def _resolution(preset: Preset, part: str, wanted: Shapes, found: Shapes) -> list[str]:
    """Why a memory of another token count cannot be used: it fixes the resolution."""
    query, memory = found.get("query_init"), preset.cache.memory
    if part != "memory" or memory is None or query is None or query == wanted["query_init"]:
        return []
    if len(query) != 3 or query[1] < 1:
        return []
    try:
        check_memory_tokens(preset.dit, memory, query[1])
    except ConfigError as e:
        return [f"{part}: {e.message}"]
    return []
