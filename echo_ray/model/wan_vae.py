"""The causal Wan2.1 VAE (spec section 9), encoder and decoder, as streams.

One latent holds four frames, the first latent of a video a single one. A decoder goes on from
what its causal convolutions saw last, which is its whole state, and works latent by latent, so
that a stream's frames do not depend on how it was cut into calls. Attribute names are those of
the published checkpoint.

Shapes: B batch, N pixel frames, F latent frames, T frames of a step, C channels, H W pixels,
h w latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from echo_ray.model.codec import Codec, CodecState
from echo_ray.model.history import History
from echo_ray.model.wan_blocks import (
    CONV_PAST,
    CausalConv,
    ChannelNorm,
    Downsample,
    ResidualBlock,
    Upsample,
    middle_blocks,
    name_histories,
    run_blocks,
)
from echo_ray.preset import WanVaeShape

MIDDLE_CONVS = 4
CONVS_PER_BLOCK = 2


class WanEncoder(nn.Module):
    """Pixels in [-1, 1] to the posterior's mean and log variance."""

    def __init__(self, shape: WanVaeShape, z_dim: int) -> None:
        super().__init__()
        widths = [shape.dim * m for m in (1, *shape.dim_mult)]
        self.conv1 = CausalConv(3, widths[0])
        self.downsamples = nn.ModuleList()
        for level, (width_in, width) in enumerate(pairwise(widths)):
            for i in range(shape.num_res_blocks):
                self.downsamples.append(ResidualBlock(width if i else width_in, width))
            if level < len(shape.temporal_downsample):
                self.downsamples.append(Downsample(width, shape.temporal_downsample[level]))
        self.middle = middle_blocks(widths[-1])
        self.head = nn.ModuleDict(
            {"0": ChannelNorm(widths[-1], 3), "2": CausalConv(widths[-1], 2 * z_dim)}
        )

    def step(self, pixels_BCTHW: Tensor, history: History) -> Tensor:
        x = self.conv1.step(pixels_BCTHW, history)
        x = run_blocks(self.downsamples, x, history)
        return run_head(self.head, run_blocks(self.middle, x, history), history)


class WanDecoder(nn.Module):
    """Raw latents to pixels around [-1, 1]; mirrors the encoder with one more block a level."""

    def __init__(self, shape: WanVaeShape, z_dim: int) -> None:
        super().__init__()
        widths = [shape.dim * m for m in reversed(shape.dim_mult)]
        self.conv1 = CausalConv(z_dim, widths[0])
        self.middle = middle_blocks(widths[0])
        self.upsamples = nn.ModuleList()
        times = tuple(reversed(shape.temporal_downsample))
        width_in = widths[0]
        for level, width in enumerate(widths):
            for i in range(shape.num_res_blocks + 1):
                self.upsamples.append(ResidualBlock(width if i else width_in, width))
            if level < len(times):
                self.upsamples.append(Upsample(width, times[level]))
                width_in = width // 2
        self.head = nn.ModuleDict({"0": ChannelNorm(widths[-1], 3), "2": CausalConv(widths[-1], 3)})

    def step(self, latent_BCThw: Tensor, history: History) -> Tensor:
        x = run_blocks(self.middle, self.conv1.step(latent_BCThw, history), history)
        return run_head(self.head, run_blocks(self.upsamples, x, history), history)


def run_head(head: nn.ModuleDict, x_BCTHW: Tensor, history: History) -> Tensor:
    norm, conv = cast(ChannelNorm, head["0"]), cast(CausalConv, head["2"])
    return conv.step_normed(x_BCTHW, norm, history)


class WanVae(Codec):
    """The published autoencoder: normalised latents, explicit state, any float type."""

    time_dim = 2

    def __init__(self, shape: WanVaeShape, z_dim: int) -> None:
        super().__init__(z_dim, shape.temporal_stride, shape.spatial_stride)
        self.shape = shape
        self.encoder = WanEncoder(shape, z_dim)
        self.conv1 = nn.Conv3d(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = nn.Conv3d(z_dim, z_dim, 1)
        self.decoder = WanDecoder(shape, z_dim)
        name_histories(self)
        self._scales: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def rebuild_latents(self) -> int:
        """The oldest latent that some kept frame of the decoder depends on, counted from the end.

        From the last convolution back to the first: each one needs two frames more of its input
        than of its output, and a temporal up-sampling half as many. 38 for the published shape.
        """
        frames = CONV_PAST
        block = CONV_PAST * CONVS_PER_BLOCK
        # Decoder levels from the last to the first, each with the up-sampling that leads to it.
        for time in (*self.shape.temporal_downsample, None):
            frames += block * (self.shape.num_res_blocks + 1)
            if time:
                frames = (frames + 1) // 2 + CONV_PAST
        return frames + CONV_PAST * MIDDLE_CONVS + CONV_PAST

    def encode_whole(self, frames_BNCHW: Tensor) -> Tensor:
        """One frame, then as many as a latent holds, again and again, as a stream."""
        return self._encode(2 * group - 1 for group in self._groups(frames_BNCHW))

    def encode_raw(self, pixels_BNCHW: Tensor) -> Tensor:
        """As `encode_whole`, of pixels in [-1, 1]."""
        return self._encode(self._groups(pixels_BNCHW))

    def decode_step(self, latent_BChw: Tensor, history: History) -> Tensor:
        """Four frames, or the one of the stream's first latent."""
        return self._pixels(latent_BChw, history).clamp(-1.0, 1.0) / 2 + 0.5

    def decode_raw(self, latent_BChw: Tensor, state: CodecState) -> tuple[Tensor, CodecState]:
        """As `decode_next`, but pixels around [-1, 1] as the decoder gives them, in float32."""
        history = History.of_stream(state, self.time_dim)
        return self._pixels(latent_BChw, history), history.state()

    def _pixels(self, latent_BChw: Tensor, history: History) -> Tensor:
        mean_C111, std_C111 = self._mean_and_std(latent_BChw.device)
        raw_BC1hw = latent_BChw[:, :, None].float() * std_C111 + mean_C111
        pixels = self.decoder.step(self.conv2(raw_BC1hw.to(self.conv2.weight.dtype)), history)
        return pixels.transpose(1, 2).float()

    def _groups(self, frames_BNCHW: Tensor) -> Iterator[Tensor]:
        yield frames_BNCHW[:, :1]
        if frames_BNCHW.shape[1] > 1:
            yield from torch.split(frames_BNCHW[:, 1:], self.temporal_stride, dim=1)

    def _encode(self, groups_BTCHW: Iterator[Tensor]) -> Tensor:
        state: CodecState = {}
        latents = []
        for index, group_BTCHW in enumerate(groups_BTCHW):
            history = History(state, first=index == 0, time_dim=self.time_dim)
            pixels_BCTHW = group_BTCHW.transpose(1, 2).to(self.conv1.weight.dtype)
            moments = self.conv1(self.encoder.step(pixels_BCTHW, history))
            latents.append(moments[:, : self.channels])
            state = history.after
        raw_BCFhw = torch.cat(latents, dim=2)
        mean_C111, std_C111 = self._mean_and_std(raw_BCFhw.device)
        normalised = (raw_BCFhw.float() - mean_C111) / std_C111
        return normalised.to(raw_BCFhw.dtype).transpose(1, 2)

    def _mean_and_std(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The latents' scale in float32; once a device, because the copy waits for it."""
        if device not in self._scales:
            with torch.inference_mode(False):
                pair = [
                    torch.tensor(values, dtype=torch.float32, device=device)[:, None, None, None]
                    for values in (self.shape.mean, self.shape.std)
                ]
            self._scales[device] = (pair[0], pair[1])
        return self._scales[device]
