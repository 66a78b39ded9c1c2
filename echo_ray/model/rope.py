"""Three-dimensional rotary embedding with explicit frame positions (spec section 3, RoPE).

Shapes: N tokens, D head size, T tokens per frame, F frames. Tables are complex128: the product is
taken in float64 and cast back (`echo_kernels.rotate`), as published.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from echo_ray.model.to_device import to_device

BASE = 10_000.0
TABLES = 64
"""Tables kept on their devices. Bounded positions have fewer; others need each for a chunk only."""


def section_pairs(head_dim: int) -> tuple[int, int, int]:
    """Complex pairs that turn with frame, row and column: what is left, a third, a third."""
    pairs = head_dim // 2
    third = pairs // 3
    return pairs - 2 * third, third, third


def section_angles(positions: Tensor, pairs: int) -> Tensor:
    """Angles [len(positions), pairs] of one section: position * BASE^(-i / pairs)."""
    i = torch.arange(pairs, dtype=torch.float64)
    return torch.outer(positions.to(torch.float64), BASE ** (-i / max(pairs, 1)))


@lru_cache(maxsize=TABLES)
def rope_table(
    positions: tuple[int, ...], grid_height: int, grid_width: int, head_dim: int, device: str
) -> Tensor:
    """Unit complex factors [F * T, D / 2] of frames at `positions`, tokens row-major in a frame."""
    frame_pairs, row_pairs, column_pairs = section_pairs(head_dim)
    frames = section_angles(torch.tensor(positions), frame_pairs)
    rows = section_angles(torch.arange(grid_height), row_pairs)
    columns = section_angles(torch.arange(grid_width), column_pairs)
    grid = (len(positions), grid_height, grid_width, -1)
    angles = torch.cat(
        [
            frames[:, None, None].expand(grid),
            rows[None, :, None].expand(grid),
            columns[None, None, :].expand(grid),
        ],
        dim=-1,
    ).reshape(len(positions) * grid_height * grid_width, head_dim // 2)
    return to_device(torch.polar(torch.ones_like(angles), angles), torch.device(device))


class FrameRope:
    """Rope tables of one latent grid, by frame positions."""

    def __init__(self, grid_height: int, grid_width: int, head_dim: int, device: str) -> None:
        self._grid = (grid_height, grid_width, head_dim, device)

    def table(self, positions: Sequence[int]) -> Tensor:
        return rope_table(tuple(positions), *self._grid)
