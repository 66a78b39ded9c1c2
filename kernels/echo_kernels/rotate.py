"""The rotation that rotary embedding is: the truth that the kernels which rotate stand beside.

Shapes: N tokens, H heads, D head size, P = D / 2 pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x_NHD: Tensor, table_NP: Tensor) -> Tensor:
    """Turn adjacent pairs of the last axis; leading axes before [N, H, D] are batched.

    The table's unit factors are complex128: products and sums are float64, rounded once.
    """
    shape = (*x_NHD.shape[:-1], x_NHD.shape[-1] // 2, 2)
    pairs = torch.view_as_complex(x_NHD.to(torch.float64).reshape(shape))
    turned = torch.view_as_real(pairs * table_NP[:, None]).flatten(-2)
    return turned.to(x_NHD.dtype)


def parts_of(table_NP: Tensor) -> Tensor:
    """A table as float64 [N, P, 2], cosine first: Triton knows no complex numbers."""
    return torch.view_as_real(table_NP).contiguous()


def check_slots(op: str, name: str, slots_BKHD: Tensor) -> None:
    """Raise `ValueError` unless a slot's heads lie one after the other and have whole pairs."""
    heads, size = slots_BKHD.shape[-2:]
    wanted = (heads * size, size, 1)
    if size % 2 or slots_BKHD.stride()[-3:] != wanted:
        raise ValueError(
            f"{op}: {name} has strides {list(slots_BKHD.stride())} and head size {size}; give an "
            f"even size and rows that end in strides {list(wanted)}"
        )
