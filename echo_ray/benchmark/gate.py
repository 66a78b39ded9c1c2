"""The gate: the engine against the baseline, chunk by chunk, before anything is timed.

Each chunk begins from the same clean latents on both sides, so what is compared is one chunk's
forwards, not how far two long roundings wander apart. In float32 every element has to be within
`ATOL` + `RTOL` of the baseline's; in bfloat16 the distance of the whole has to be within a share of
its size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from echo_ray.benchmark.baseline import Baseline, Stream
from echo_ray.engine.generator import Generator, LatentState, Noise

ATOL = RTOL = 1e-4
"""As the parity fixtures have it."""
SHARE = 0.02
"""Of a whole tensor in bfloat16, as `echo-ray parity --dtype bf16` has it for rollouts."""
SHARE_8 = 0.25
"""Of a whole tensor in a tier of 8 bits: that it is the same model, not that it is as good."""
FIRST_MATURE = 6
"""From this chunk on nothing changes any more but the numbers."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One number of the gate: `found` has to be at most `allowed`."""

    what: str
    chunk: int
    found: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.found <= self.allowed

    def line(self) -> str:
        verdict = "pass" if self.passed else "FAIL"
        found = f"{self.found:.2e} of {self.allowed:.0e} allowed"
        return f"chunk {self.chunk:2} {self.what:14} {found}  {verdict}"


def failed(results: Sequence[Compared]) -> list[Compared]:
    return [r for r in results if not r.passed]


def compare(
    generator: Generator,
    baseline: Baseline,
    prompts: Sequence[Tensor],
    noise: Noise,
    chunks: int,
    share: float | None = None,
    switches: Sequence[int] | None = None,
) -> Iterator[Compared]:
    """Every compared number of `chunks` chunks from scratch.

    `share`: what a whole tensor may differ by, where that is not for its kind of float to say.
    `switches`: the chunks before which each further prompt is switched to, a chunk twice if two
    come at once; None: the middle of the mature phase.
    """
    ours, theirs = generator.start(prompts[0]), baseline.start(prompts[0])
    middle = FIRST_MATURE + (chunks - FIRST_MATURE) // 2
    at = [middle] * (len(prompts) - 1) if switches is None else switches
    for chunk in range(chunks):
        for _, prompt in (pair for pair in zip(at, prompts[1:], strict=True) if pair[0] == chunk):
            generator.switch(ours, prompt)
            baseline.switch(theirs, prompt)
        clean = generator.denoise(ours, noise)
        expected = baseline.generate(theirs, noise)
        generator.absorb(ours, expected)
        yield compared("latents", chunk, clean, expected, share)
        if theirs.has_history and ours.query_BMC is not None and theirs.query_BMC is not None:
            yield compared("memory", chunk, ours.query_BMC, theirs.query_BMC, share)
        yield from _window(generator, ours, baseline, theirs, chunk, share)
    generator.close(ours)


def _window(
    generator: Generator,
    ours: LatentState,
    baseline: Baseline,
    theirs: Stream,
    chunk: int,
    share: float | None,
) -> Iterator[Compared]:
    """Rotated keys and values that the chunk left in the first and the last layer."""
    count = generator.cache.frames_per_chunk
    call = ours.window.call(chunk * count, count, see_memory=False)
    for name, layer in (("first layer", 0), ("last layer", generator.dit.shape.num_layers - 1)):
        slots, (keys, values) = call.slots(layer), baseline.window(theirs, layer)
        yield compared(f"keys, {name}", chunk, slots.seen_keys_BMHD, keys, share)
        yield compared(f"values, {name}", chunk, slots.seen_values_BMHD, values, share)


def compared(
    what: str, chunk: int, found: Tensor, expected: Tensor, share: float | None = None
) -> Compared:
    """A share of the expected tensor's size in bfloat16, else of what each element is allowed."""
    if found.shape != expected.shape:
        return Compared(what, chunk, float("inf"), 0.0)
    gap = found.double() - expected.double()
    if expected.dtype == torch.float32 and share is None:
        worst = (gap.abs() / (ATOL + RTOL * expected.double().abs())).max()
        return Compared(what, chunk, _finite(worst) * ATOL, ATOL)
    off = gap.norm() / expected.double().norm().clamp_min(1e-12)
    return Compared(what, chunk, _finite(off), SHARE if share is None else share)


def _finite(value: Tensor) -> float:
    number = float(value)
    return number if number == number else float("inf")
