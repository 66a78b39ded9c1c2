"""Compile every kernel for an H100, down to machine code; run by a test as a program of its own.

Triton needs no GPU for this, but not its interpreter either. The interpreter runs programs that the
compiler refuses (whatever numpy can do), so a kernel has to pass both. Launches go all the way that
they go on a GPU, up to a driver that does nothing: arguments are bound and told apart as there.
Prints a line per kernel: name, bytes of machine code, fused multiply-adds.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

import echo_kernels
from echo_kernels import Slots
from echo_kernels.launch import OPTIONS, Kernel

SHARED = 227 * 1024
"""Bytes of shared memory that a block of an H100 can have."""
MOST = (2**31 - 1, 65535, 65535)
"""Programs along each axis of a grid."""


class H100:
    """A driver as far as launches ask for one."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED, "max_num_regs": 65536},
            # Module, function, registers, spills, threads of a block at most.
            load_binary=lambda *binary: (1, 2, 0, 0, 1024),
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(*arguments: Any) -> None:
            assert all(0 < count <= most for count, most in zip(arguments, MOST, strict=False))

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_only(self: Kernel, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """As `Kernel.launch`."""
    code = self.compiled[grid](*arguments, **constants, **OPTIONS)
    name, size = self.function.__name__, len(code.asm["cubin"])
    sys.stdout.write(f"{name} {size} {code.asm['ptx'].count('fma.rn')}\n")


def compile_all(kind: torch.dtype) -> None:
    """Every kernel in every variant, at the width of the published model."""
    heads, size, tokens = 12, 128, 4680
    width = heads * size
    x = torch.zeros(1, tokens, width, dtype=kind)
    weight, frames = x[0, 0], x[:, :3]
    echo_kernels.rms_norm.kernel(x, weight, 1e-6)
    for modulate in (echo_kernels.layernorm_modulate, echo_kernels.layernorm_modulate8):
        modulate.kernel(x, frames, frames, 1e-6)
    for gate in (frames, None):
        echo_kernels.residual_modulate.kernel(x, x, gate, frames, frames, 1e-6)
        echo_kernels.residual_layernorm.kernel(x, x, gate, weight, weight, 1e-6)
    echo_kernels.residual_modulate8.kernel(x, x, frames, frames, frames, 1e-6)
    echo_kernels.residual_layernorm8.kernel(x, x, frames, weight, weight, 1e-6)
    echo_kernels.rows8.kernel(x)
    echo_kernels.gelu_rows8.kernel(torch.zeros(2, 8960, dtype=kind))
    echo_kernels.heads8.kernel(x.view(1, tokens, heads, size), torch.ones(heads))
    echo_kernels.memory_gate_blend.kernel(x, x, x)
    echo_kernels.frames_to_uint8.kernel(x.view(1, 3, 6, -1))
    picture = x.view(1, 96, 1, 6, -1)
    for count, past in ((1, None), (4, picture)):
        new = picture.expand(-1, -1, count, -1, -1)
        seen = None if past is None else past.expand(-1, -1, 2, -1, -1)
        kept = torch.zeros(1, 96, 2, *picture.shape[3:], dtype=kind)
        echo_kernels.norm_silu_join.kernel(new, weight[:96], seen, kept)
    window = x.view(1, 1, tokens, heads, size)
    rope = torch.ones(tokens, size // 2, dtype=torch.complex128)
    slots = Slots(rope, rope, *[window[0]] * 5)
    for norm in (weight, None):
        echo_kernels.qk_norm_rope_write.kernel(x, x, x, norm, norm, 1e-6, slots)
    echo_kernels.chunk_advance.kernel(window, window, window, rope[: tokens - 1560], 1560)
    echo_kernels.chunk_advance.kernel(window, window, window, rope, 0)
    echo_kernels.place_memory.kernel(window[0], window[0], rope, window, window)


if __name__ == "__main__":
    triton.runtime.driver.set_active(H100())
    Kernel.launch = compile_only  # type: ignore[method-assign]
    compile_all(torch.bfloat16)
