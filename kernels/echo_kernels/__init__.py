"""Device kernels with a plain PyTorch truth beside each. Imports torch, never echo_ray.

An op runs its Triton kernel on CUDA and its truth elsewhere; `ECHO_KERNELS=reference` forces the
truth. Triton itself is imported when the first kernel is.
"""

from __future__ import annotations

from echo_kernels.chunk_advance import chunk_advance, place_memory
from echo_kernels.dispatch import check_choice, failed, fallbacks
from echo_kernels.frames_to_uint8 import frames_to_uint8
from echo_kernels.gated_residual_norm import (
    residual_layernorm,
    residual_layernorm8,
    residual_modulate,
    residual_modulate8,
)
from echo_kernels.heads8 import heads8
from echo_kernels.layernorm_modulate import layernorm_modulate, layernorm_modulate8
from echo_kernels.linear8 import linear8
from echo_kernels.memory_gate_blend import memory_gate_blend
from echo_kernels.norm_silu_join import norm_silu_join
from echo_kernels.qk_norm_rope_write import Slots, qk_norm_rope_write
from echo_kernels.rms_norm import rms_norm
from echo_kernels.rows8 import Rows8, gelu_rows8, rows8

__all__ = [
    "Rows8",
    "Slots",
    "check_choice",
    "chunk_advance",
    "failed",
    "fallbacks",
    "frames_to_uint8",
    "gelu_rows8",
    "heads8",
    "layernorm_modulate",
    "layernorm_modulate8",
    "linear8",
    "memory_gate_blend",
    "norm_silu_join",
    "place_memory",
    "qk_norm_rope_write",
    "residual_layernorm",
    "residual_layernorm8",
    "residual_modulate",
    "residual_modulate8",
    "rms_norm",
    "rows8",
]
