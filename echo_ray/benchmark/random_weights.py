"""Random weights of any preset's size, drawn on the device from a seed, and prompts beside them.

A benchmark needs numbers of the size that trained ones have: of zeros a matrix product is quicker,
and of larger ones a residual stream overflows. `check_residuals` tells.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from echo_ray.errors import EngineError
from echo_ray.model.codec import Codec
from echo_ray.model.dit import DiT
from echo_ray.model.memory import MemoryEncoder
from echo_ray.preset import CodecShape, DiTShape, Preset
from echo_ray.weights.modules import Modules, lay_out
from echo_ray.weights.parts import DTYPES, build_codec

PROMPT_ROWS = 60
"""Rows of a random prompt that are not zero: about a long sentence."""
RESIDUAL_RMS = (0.1, 100.0)
"""Between these the residual stream of every layer has to stay."""


@dataclass(frozen=True, slots=True)
class RandomPrompts:
    """Stands in for a text encoder: rows that depend on the prompt's letters and nothing else."""

    shape: DiTShape
    device: torch.device
    dtype: torch.dtype

    def encode(self, prompt: str) -> Tensor:
        """Rows [1, text_len, text_dim], the last of them zero as padding is."""
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7], "little")
        used = min(PROMPT_ROWS, max(1, self.shape.text_len - 1))
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(used, self.shape.text_dim, generator=generator)
        rows = torch.zeros(1, self.shape.text_len, self.shape.text_dim)
        rows[0, :used] = drawn
        return rows.to(self.device, self.dtype)

    def understood(self, prompt: str) -> tuple[list[str], list[str]]:
        return prompt.split(), []


def random_modules(preset: Preset, device: torch.device, seed: int) -> Modules:
    """The preset's transformer, memory encoder and codec; umT5 is not built."""
    dtype = DTYPES[preset.dtype]
    with torch.device("meta"):
        dit: nn.Module = DiT(preset.dit)
        memory = None
        if preset.cache.memory is not None:
            memory = MemoryEncoder(preset.dit, preset.cache.memory)
    drawn(dit, device, dtype, seed)
    if memory is not None:
        drawn(memory, device, dtype, seed + 1)
    assert isinstance(dit, DiT)
    codec = random_codec(preset.codec, preset.dit, device, dtype, seed + 2)
    lay_out(codec, device)
    text = RandomPrompts(preset.dit, device, dtype)
    return Modules(dit, memory, text, codec, f"random-{seed}-{device.type}")


def random_codec(
    shape: CodecShape, dit: DiTShape, device: torch.device, dtype: torch.dtype, seed: int
) -> Codec:
    """As it is published: no layout is chosen for the device."""
    with torch.device("meta"):
        codec = build_codec(shape, dit)
    drawn(codec, device, dtype, seed)
    return codec


def drawn(module: nn.Module, device: torch.device, dtype: torch.dtype, seed: int) -> None:
    """Give a module of the meta device memory on `device` and values from `seed`."""
    module.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            middle, spread = _scale(name, parameter)
            parameter.normal_(middle, spread, generator=generator)
    module.eval().requires_grad_(requires_grad=False)


def _scale(name: str, parameter: Tensor) -> tuple[float, float]:
    """Mean and deviation: linears keep their input's size, gates stand as training begins them."""
    last = name.rpartition(".")[2]
    if last == "query_init":
        return 0.0, 0.014
    if last == "modulation":
        return 0.0, 0.2
    if last == "bias":
        return (2.0, 0.1) if "gate_linear" in name else (0.0, 0.02)
    if last == "gamma" or parameter.dim() == 1:
        return 1.0, 0.1
    return 0.0, 1.0 / math.sqrt(max(1, math.prod(parameter.shape[1:])))


def check_residuals(residuals: list[Tensor]) -> tuple[float, float]:
    """Smallest and largest RMS of the layers' residual streams.

    Raises `EngineError` where one is not finite or lies outside `RESIDUAL_RMS`.
    """
    low, high = RESIDUAL_RMS
    sizes = [float(r.float().pow(2).mean().sqrt()) for r in residuals]
    for layer, size in enumerate(sizes):
        if not low <= size <= high:
            raise EngineError(
                f"random weights: the residual stream after layer {layer} has an RMS of "
                f"{size:.3g}, not from {low:g} to {high:g}; timings of such numbers mean nothing: "
                "use another --seed, or correct the scales in benchmark/random_weights.py"
            )
    return min(sizes), max(sizes)
