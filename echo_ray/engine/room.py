"""Whether one more session fits on a GPU, asked before anything of it is made.

Shapes: Y layers, F frames, T tokens per frame, P text tokens, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial

import torch
from torch import nn

from echo_ray.engine.live_bytes import LiveBytes
from echo_ray.errors import DeviceFull, EngineError
from echo_ray.model.codec import Codec
from echo_ray.preset import Preset
from echo_ray.weights.parts import DTYPES, build_parts, codec_part

GIB = 2**30
RETRY_AFTER_S = 5.0


class Room:
    """What a session of a preset takes of a device, and what of it is free."""

    def __init__(self, preset: Preset, device: str, free: Callable[[], int] | None) -> None:
        """`free`: bytes that can be had now; None: not ours to count, and nothing is refused."""
        self._preset = preset
        self._device = device
        self._free = free

    @cached_property
    def parts(self) -> Mapping[str, int]:
        """Bytes of a session, by what they are for; counted from the preset's shapes."""
        return session_parts(self._preset)

    def check(self, left: Collection[str] = ()) -> None:
        """Raise `DeviceFull` unless one more session fits.

        `left`: parts that another session left and that wait for it.
        """
        if self._free is None:
            return
        missing, free = self._missing(left), self._free()
        if sum(missing.values()) > free:
            raise self._full(missing, f"{free:,} are free")

    @contextmanager
    def taken(self, left: Collection[str] = ()) -> Iterator[None]:
        """Check, then let a session be made. Memory that runs out nevertheless is a `DeviceFull`,
        too: what is free may lie in pieces."""
        self.check(left)
        try:
            yield
        except torch.OutOfMemoryError as e:
            missing = self._missing(left)
            raise self._full(missing, f"no room in one piece: {e}") from e

    def _missing(self, left: Collection[str]) -> dict[str, int]:
        return {name: size for name, size in self.parts.items() if name not in left}

    def _full(self, missing: Mapping[str, int], why: str) -> DeviceFull:
        told = ", ".join(f"{name} {size:,}" for name, size in missing.items())
        return DeviceFull(
            f"a session of {self._preset.name} needs {sum(missing.values()):,} bytes on "
            f"{self._device} ({told}), {why}; sessions that run here go on; close some, add a "
            "replica, or lower limits.sessions_per_replica",
            retry_after_s=RETRY_AFTER_S,
        )


def room_of(preset: Preset, device: torch.device) -> Room:
    """The room on a GPU; a CPU's memory is the system's to share out."""
    free = partial(free_bytes, device) if device.type == "cuda" else None
    return Room(preset, str(device), free)


def free_bytes(device: torch.device) -> int:
    """What a GPU has left: to anybody, and what PyTorch holds without using it."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def session_parts(preset: Preset) -> dict[str, int]:
    """Bytes of one session: what it keeps, and what its forwards and its decodings hold meanwhile.

    Both at once: they run in lanes of their own, beside each other.
    """
    dit, cache, size = preset.dit, preset.cache, DTYPES[preset.dtype].itemsize
    memory = 3 * cache.memory_frames * dit.tokens_per_frame * dit.dim
    # The prompt that stands, and the sink's.
    prompts = 2 * 2 * dit.num_layers * dit.text_len * dit.dim
    # A switch passes the whole window at once: the stream, its norm, a branch's queries, keys and
    # values or the feed-forward's two widths.
    tokens = cache.window_frames * dit.tokens_per_frame
    forward = tokens * (3 * dit.dim + max(3 * dit.dim, 2 * dit.ffn_dim))
    state_bytes, decoding_bytes = decoder_bytes(preset)
    return {
        "window": size * _window_numbers(preset),
        "memory": size * memory,
        "prompts": size * prompts,
        "decoder": state_bytes,
        "forward": size * forward,
        "decoding": decoding_bytes,
    }


def _window_numbers(preset: Preset) -> int:
    """Un-rotated keys, and rotated keys and values beside those of the memory."""
    dit, cache = preset.dit, preset.cache
    frames = 3 * cache.window_frames + 2 * cache.memory_frames
    return dit.num_layers * frames * dit.tokens_per_frame * dit.dim


@torch.inference_mode(mode=False)
@torch.no_grad()
def decoder_bytes(preset: Preset) -> tuple[int, int]:
    """What a decoder keeps from the second latent on, and the most that a chunk's decoding holds.

    The second is a latent's scratch, with past and new frames in one piece before each convolution,
    and the chunk's frames, once by latent and once together. Ops count as their plain forms, which
    hold more than kernels do. Nothing is computed.
    """
    with torch.device("meta"):
        codec = build_parts(preset)[codec_part(preset.codec)]
    if not isinstance(codec, Codec) or not isinstance(codec, nn.Module):
        raise EngineError(f"preset {preset.name} has no codec")
    dit, dtype = preset.dit, DTYPES[preset.dtype]
    codec.to(dtype)
    size = (1, dit.in_channels, dit.latent_height, dit.latent_width)
    latent = torch.zeros(size, device="meta", dtype=dtype)
    state = codec.fixed_state(latent)
    with LiveBytes() as counted:
        frames = codec.decode_fixed(latent, state, first=False)
    return sum(t.nbytes for t in state.values()), (
        counted.peak + 2 * preset.cache.frames_per_chunk * frames.nbytes
    )
