"""The arithmetic of a mature chunk, counted from the shapes: what a time is divided into.

Two operations a multiplication and addition. Norms, rotations and gates are not counted, as is
usual; nor is what a context pass leaves out, for it is the algorithm that is counted, not a form.
"""

from __future__ import annotations

from dataclasses import dataclass

from echo_ray.preset import Preset


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations of one chunk."""

    linears: float
    attention: float
    cross: float
    memory: float

    @property
    def flops(self) -> float:
        return self.linears + self.attention + self.cross + self.memory


def key_counts(preset: Preset) -> list[int]:
    """Keys that a chunk's queries see in every phase, rising."""
    cache, tokens = preset.cache, preset.dit.tokens_per_frame
    step = cache.frames_per_chunk
    frames = [*range(step, cache.window_frames + 1, step)]
    if cache.memory_frames:
        frames.append(cache.window_frames + cache.memory_frames)
    return [n * tokens for n in frames]


def work_of(preset: Preset) -> Work:
    dit, cache = preset.dit, preset.cache
    d, queries = dit.dim, cache.frames_per_chunk * dit.tokens_per_frame
    forwards = dit.num_layers * (len(preset.sampler.steps) + 1)
    linears = forwards * 2 * queries * (6 * d * d + 2 * d * dit.ffn_dim)
    seen = key_counts(preset)[-1]
    memory = 0.0
    if cache.memory is not None:
        m = cache.memory.frames * dit.tokens_per_frame
        ffn = cache.memory.ffn_dim or 4 * d
        layer = 2 * (2 * m * d * d + 2 * m * d * ffn + 2 * m * queries * d)
        memory = cache.memory.encoder_layers * layer + 2 * m * d * d * (2 + 2 + 2)
    return Work(
        linears=linears,
        attention=forwards * 4 * queries * seen * d,
        cross=forwards * 4 * queries * dit.text_len * d,
        memory=memory,
    )
