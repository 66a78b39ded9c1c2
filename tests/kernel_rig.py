"""Where kernels are tried: on the GPU if there is one, else in Triton's interpreter.

Tensors lie between guards of NaN, so that a kernel which reads past them computes NaN and one which
writes past them is found out.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
GUARD = 64
KINDS = (torch.float32, torch.bfloat16)


def load_triton() -> bool:
    """Import Triton, for the interpreter where there is no GPU: its own functions are either too.

    False where it is not installed.
    """
    before = os.environ.get("TRITON_INTERPRET")
    if INTERPRETED:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.language as tl
    except ImportError:
        return False
    finally:
        if INTERPRETED and before is None:
            del os.environ["TRITON_INTERPRET"]
    if INTERPRETED:
        assert type(tl.sum).__name__ == "InterpretedFunction", "Triton was imported before"
    return True


def to_nearest(data: Any, source: Any, target: Any, mode: Any) -> Any:
    """The interpreter's float conversion as devices do it; its own cuts bits off."""
    kinds = {
        "bf16": (torch.bfloat16, torch.int16, np.uint16),
        "fp32": (torch.float32, torch.int32, np.uint32),
        "fp8e4nv": (torch.float8_e4m3fn, torch.uint8, np.uint8),
    }
    value, bits, _ = kinds[source.name]
    to, to_bits, raw = kinds[target.name]
    held = torch.from_numpy(np.ascontiguousarray(data).view(bits_of(bits))).view(value)
    return held.to(to).view(to_bits).numpy().view(raw)


def bits_of(kind: torch.dtype) -> Any:
    return {torch.int16: np.int16, torch.int32: np.int32, torch.uint8: np.uint8}[kind]


def guarded(x: Tensor) -> Tensor:
    """The same numbers on the device, between guards."""
    whole = torch.full((x.numel() + 2 * GUARD,), math.nan, dtype=x.dtype, device=DEVICE)
    inside = whole[GUARD : GUARD + x.numel()].view(x.shape)
    inside.copy_(x)
    return inside


def guards_hold(x: Tensor) -> bool:
    start = x.storage_offset()
    whole = x.new_empty(0).set_(x.untyped_storage())
    return bool(whole[:start].isnan().all() and whole[start + x.numel() :].isnan().all())


def normal(seed: int, *shape: int, kind: torch.dtype = torch.float32) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return guarded(torch.randn(shape, generator=source).to(kind))


def near(found: Tensor, truth: Tensor, steps: int) -> bool:
    """Equal but for so many steps of the last place of numbers near 1, or of their own size.

    In bfloat16 at most one number in a hundred may differ at all: one float32 rounding seldom tips
    a coarser one, while a rounding that is left out changes every third number.
    """
    assert found.dtype == truth.dtype
    assert found.shape == truth.shape
    assert bool(found.isfinite().all())
    if truth.dtype is torch.bfloat16 and int((found != truth).sum()) > 1 + truth.numel() // 100:
        return False
    last = torch.finfo(truth.dtype).eps
    wide = truth.double()
    return bool(((found.double() - wide).abs() <= steps * last * wide.abs().clamp(min=1)).all())
