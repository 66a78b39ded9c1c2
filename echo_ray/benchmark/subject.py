"""What is measured: one set of random weights, our engine in every setting of it, the baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from echo_ray.benchmark.baseline import Baseline
from echo_ray.benchmark.plan import Budget, Plan
from echo_ray.benchmark.random_weights import random_modules
from echo_ray.benchmark.timing import Timer
from echo_ray.engine.generator import Noise
from echo_ray.engine.noise import gaussian
from echo_ray.engine.rounding import repeat_bits
from echo_ray.preset import Preset, TinyVaeShape, with_codec
from echo_ray.weights.modules import Modules

PROMPTS = ("a lighthouse on a rock at dusk, waves", "the same lighthouse, heavy snow")
NOISE_CHUNKS = 4
"""Noise is drawn beforehand, for so many chunks, again and again: drawing it is no part of what is
compared, and both sides get the same."""


@dataclass(frozen=True, slots=True)
class Bench:
    """All that a stage works with."""

    preset: Preset
    device: torch.device
    seed: int
    plan: Plan
    budget: Budget
    timer: Timer
    say: Callable[[str], None]
    """A line of progress; never a figure."""
    modules: Modules = field(init=False)
    weights: dict[str, dict[str, Tensor]] = field(init=False)
    """The transformer's and the memory's tensors, as the baseline keeps them."""
    _noises: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        modules = random_modules(self.preset, self.device, self.seed)
        object.__setattr__(self, "modules", modules)
        parts = {"dit": dict(modules.dit.state_dict())}
        if modules.memory is not None:
            parts["memory"] = dict(modules.memory.state_dict())
        object.__setattr__(self, "weights", parts)

    @property
    def dry(self) -> bool:
        return self.device.type != "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return self.weights["dit"]["patch_embedding.weight"].dtype

    @property
    def noise_shape(self) -> tuple[int, ...]:
        dit = self.preset.dit
        count = self.preset.cache.frames_per_chunk
        return (1, count, dit.in_channels, dit.latent_height, dit.latent_width)

    def baseline(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Baseline:
        return Baseline(self.preset, self.weights["dit"], self.weights.get("memory"), attend)

    def prompts(self) -> list[Tensor]:
        return [self.modules.text.encode(prompt) for prompt in PROMPTS]

    def noise(self) -> Noise:
        """Of (chunk, step), on the device."""

        def drawn(chunk: int, step: int) -> Tensor:
            key = (chunk % NOISE_CHUNKS, step)
            if key not in self._noises:
                values = gaussian(self.seed, *key, self.noise_shape)
                self._noises[key] = values.to(self.device, self.dtype)
            return self._noises[key]

        return drawn


def unconsolidated(preset: Preset) -> Preset:
    """Without points, which the published loop does not have."""
    return replace(preset, cache=replace(preset.cache, point_every=0))


def quick_codec(preset: Preset) -> Preset:
    """With its small codec where it has one, which is what streams in real time are decoded by."""
    if preset.small_codec is None:
        return preset
    assert isinstance(preset.small_codec, TinyVaeShape)
    return with_codec(preset, preset.small_codec.kind)


@contextmanager
def running(threads: int | None = None) -> Iterator[None]:
    """No gradients, bits that repeat; on a CPU with a fixed number of threads."""
    repeat_bits()
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)
