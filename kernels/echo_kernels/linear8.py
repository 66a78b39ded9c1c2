"""A linear layer whose input and weight are rows in 8 bits: products are summed in float32.

Shapes: C input width, O output width; any axes before C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from echo_kernels.dispatch import FLOATS, Op, expect
from echo_kernels.rows8 import E4M3, Rows8


def check(x_C: Rows8, weight_OC: Rows8, bias_O: Tensor | None, kind: torch.dtype) -> None:
    op, (outputs, channels) = "linear8", weight_OC.values.shape
    expect(op, "x", x_C.values, (*x_C.values.shape[:-1], channels))
    expect(op, "scales of x", x_C.scales, (*x_C.values.shape[:-1], 1))
    expect(op, "scales of weight", weight_OC.scales, (outputs, 1))
    if bias_O is not None:
        expect(op, "bias", bias_O, (outputs,))
    for name, rows in (("x", x_C), ("weight", weight_OC)):
        if rows.values.dtype is not E4M3 or rows.scales.dtype is not torch.float32:
            raise ValueError(
                f"{op}: {name} is {rows.values.dtype} with scales of {rows.scales.dtype}; give "
                f"{E4M3} and {torch.float32}, as rows8 makes them"
            )
    if kind not in FLOATS:
        raise ValueError(f"{op}: kind is {kind}; give one of {', '.join(map(str, FLOATS))}")


def truth(x_C: Rows8, weight_OC: Rows8, bias_O: Tensor | None, kind: torch.dtype) -> Tensor:
    """x weightᵀ + bias, rounded once, to `kind`."""
    out_O = x_C.values.float() @ weight_OC.values.float().mT
    out_O = out_O * x_C.scales * weight_OC.scales.mT
    return (out_O if bias_O is None else out_O + bias_O.float()).to(kind)


def run(x_C: Rows8, weight_OC: Rows8, bias_O: Tensor | None, kind: torch.dtype) -> Tensor:
    """PyTorch's, which sums in float32 all the way: the quick way rounds sums to fewer bits."""
    channels = x_C.values.shape[-1]
    out = torch._scaled_mm(
        x_C.values.reshape(-1, channels),
        weight_OC.values.t(),
        scale_a=x_C.scales.reshape(-1, 1),
        scale_b=weight_OC.scales.t(),
        bias=bias_O,
        out_dtype=kind,
        use_fast_accum=False,
    )
    return out.view(*x_C.values.shape[:-1], -1)


linear8 = Op("linear8", check, truth, run, mixed=True)
