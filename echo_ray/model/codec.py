"""What every codec can do: frames to latents, and a stream of latents to frames.

A decoder's past is a value, a `CodecState`, that goes in and comes out; modules hold weights only.

Shapes: B batch, N pixel frames, F latent frames, C channels, H W pixels, h w latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from echo_ray.errors import EngineError, InvalidRequestError
from echo_ray.model.history import BEGUN, History, begun_flag

CodecState = dict[str, Tensor]
"""What a decoder keeps of the latents before; changed in place by `decode_fixed` only."""


class Codec(nn.Module, ABC):
    """A causal video autoencoder: 1 + 4k frames are 1 + k latents."""

    time_dim = 1
    """Where the frames are in what a decoder keeps."""

    def __init__(self, channels: int, temporal_stride: int, spatial_stride: int) -> None:
        super().__init__()
        self.channels = channels
        self.temporal_stride = temporal_stride
        self.spatial_stride = spatial_stride

    @property
    @abstractmethod
    def rebuild_latents(self) -> int:
        """Trailing latents from which `rebuild` gives the live state, bit for bit."""

    def encode(self, frames_BNCHW: Tensor) -> Tensor:
        """Whole video in [0, 1], 1 + 4k frames, to normalised latents [B, 1 + k, C, h, w].

        Raises `InvalidRequestError` unless the strides divide the video so.
        """
        check_frames(frames_BNCHW, self.temporal_stride, self.spatial_stride)
        return self.encode_whole(frames_BNCHW)

    @abstractmethod
    def encode_whole(self, frames_BNCHW: Tensor) -> Tensor:
        """What `encode` gives, of frames that were checked."""

    def initial_state(self) -> CodecState:
        """State of a stream of which nothing was decoded yet."""
        return {BEGUN: begun_flag(False)}

    def midstream_state(self) -> CodecState:
        """State of a stream whose past is unknown: zeros, but for that there was one.

        What the zeros do to the next latents has died out after `rebuild_latents` of them.
        """
        return {BEGUN: begun_flag(True)}

    def decode(self, latents_BFChw: Tensor, state: CodecState) -> tuple[Tensor, CodecState]:
        """Frames [B, N, 3, H, W], float32 in [0, 1], of the next latents of a stream.

        The stream's very first latent is one frame, every later one `temporal_stride` frames.
        Latent by latent, so that how a stream is cut into calls changes no bit of its frames.
        Raises `InvalidRequestError` for latents of other channels.
        """
        check_latents(latents_BFChw, self.channels)
        b, _, _, h, w = latents_BFChw.shape
        size = (b, 0, 3, self.spatial_stride * h, self.spatial_stride * w)
        parts = [latents_BFChw.new_zeros(size, dtype=torch.float32)]
        for index, latent_BChw in enumerate(latents_BFChw.unbind(1)):
            # From the second latent on the state is this call's own.
            history = History.of_stream(state, self.time_dim, in_place=index > 0)
            parts.append(self.decode_step(latent_BChw, history))
            state = history.state()
        return torch.cat(parts, dim=1), state

    def decode_next(self, latent_BChw: Tensor, state: CodecState) -> tuple[Tensor, CodecState]:
        """The frames of one latent, as `decode` gives them, and the state after it."""
        history = History.of_stream(state, self.time_dim)
        return self.decode_step(latent_BChw, history), history.state()

    def decode_fixed(self, latent_BChw: Tensor, state: CodecState, *, first: bool) -> Tensor:
        """As `decode_next`, but a `fixed_state` becomes the state after it, where it lies.

        `first`: this is a stream's first latent; the flag in `state` is neither read nor changed.
        No value decides what runs, nothing but the frames outlives the call, and every call finds
        what it reads and writes at the same addresses: a device graph can record it, once for a
        stream's first latent and once for all others. Raises `EngineError` for another state.
        """
        history = History(state, first=first, time_dim=self.time_dim, in_place=True)
        frames = self.decode_step(latent_BChw, history)
        if lacking := sorted(history.after.keys() - state.keys()):
            raise EngineError(f"state has no room for {lacking[0]}; make it with fixed_state")
        return frames

    def fixed_state(self, latent_BChw: Tensor) -> CodecState:
        """The initial state with room for every past of a stream of such latents.

        Decodes one latent of zeros, so whatever a codec makes once for a device is made, too.
        """
        _, state = self.decode_next(torch.zeros_like(latent_BChw), self.midstream_state())
        return {key: torch.zeros_like(past) for key, past in state.items()}

    @abstractmethod
    def decode_step(self, latent_BChw: Tensor, history: History) -> Tensor:
        """The frames of one latent, whose past is in `history` and goes on there."""

    def lie_channels_last(self) -> None:
        """Lay weights out as a GPU's convolutions read them; what they compute lies so, too.

        Frames change by rounding. PyTorch's 16-bit convolutions over time use cuDNN 9.8 to 9.14 in
        this layout only; in the other one a GPU turns every input and output around.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                module.weight.data = module.weight.contiguous(memory_format=torch.channels_last_3d)
            elif isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.contiguous(memory_format=torch.channels_last)

    def rebuild(self, latents_BFChw: Tensor, first: bool) -> CodecState:
        """State after the given trailing latents; `first`: they start where the stream starts."""
        state = self.initial_state() if first else self.midstream_state()
        return self.decode(latents_BFChw, state)[1]


def check_frames(frames_BNCHW: Tensor, time: int, space: int) -> None:
    """Raise `InvalidRequestError` unless a codec of these strides can encode such a video."""
    n, _, height, width = frames_BNCHW.shape[1:]
    if n < 1 or (n - 1) % time:
        raise InvalidRequestError(
            f"{n} frames cannot be encoded: needs 1 + a multiple of {time}; "
            f"give {max(0, n - 1) // time * time + 1}"
        )
    if height % space or width % space:
        raise InvalidRequestError(
            f"frames of {width} x {height} cannot be encoded: "
            f"width and height must be multiples of {space}; scale or crop them"
        )


def check_latents(latents_BFChw: Tensor, channels: int) -> None:
    """Raise `InvalidRequestError` unless these are a stream's latents of so many channels."""
    if latents_BFChw.ndim != 5 or latents_BFChw.shape[2] != channels:
        raise InvalidRequestError(
            f"latents of shape {tuple(latents_BFChw.shape)} cannot be decoded: this codec "
            f"needs [batch, latents, {channels}, height, width]"
        )
