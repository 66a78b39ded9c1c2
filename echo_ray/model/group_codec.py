"""Latents to frames and back for the tiny preset: a group of frames as channels of one image.

One latent holds `temporal_stride` frames; the first latent of a video holds its first frame,
repeated, and decodes to that one frame. So 1 + 4k frames make 1 + k latents, nothing looks ahead,
and a stream decodes latent by latent with no cache to keep: the state says only whether the first
latent was seen.

Shapes: B batch, N pixel frames, F latent frames, G groups, C channels, H W pixels, h w latents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from echo_ray.model.codec import Codec, CodecState
from echo_ray.model.history import History
from echo_ray.preset import GroupCodecShape

NORM_GROUPS = 8


class ResidualBlock(nn.Module):
    """Two convolutions with their norms, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(NORM_GROUPS, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(fn.silu(self.norm1(x)))
        y = self.conv2(fn.silu(self.norm2(y)))
        out: Tensor = x + y
        return out


class GroupEncoder(nn.Module):
    """Groups of frames to raw latents: coarse features first, then half the size."""

    def __init__(self, shape: GroupCodecShape, channels: int) -> None:
        super().__init__()
        fine, coarse = shape.widths
        fold = shape.spatial_stride // 2
        blocks = max(1, shape.blocks - 1)
        self.fold = nn.PixelUnshuffle(fold)
        self.stem = nn.Conv2d(3 * shape.temporal_stride * fold**2, fine, 3, padding=1)
        self.fine = nn.Sequential(*(ResidualBlock(fine) for _ in range(blocks)))
        self.down = nn.Conv2d(fine, coarse, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(*(ResidualBlock(coarse) for _ in range(blocks)))
        self.head = nn.Conv2d(coarse, channels, 1)

    def forward(self, groups_GCHW: Tensor) -> Tensor:
        x = self.fine(self.stem(self.fold(groups_GCHW)))
        out: Tensor = self.head(self.coarse(self.down(x)))
        return out


class GroupDecoder(nn.Module):
    """Raw latents to groups of frames; mirrors the encoder with one more block a level."""

    def __init__(self, shape: GroupCodecShape, channels: int) -> None:
        super().__init__()
        fine, coarse = shape.widths
        fold = shape.spatial_stride // 2
        self.stem = nn.Conv2d(channels, coarse, 3, padding=1)
        self.coarse = nn.Sequential(*(ResidualBlock(coarse) for _ in range(shape.blocks)))
        self.up = nn.Sequential(nn.Conv2d(coarse, 4 * fine, 1), nn.PixelShuffle(2))
        self.fine = nn.Sequential(*(ResidualBlock(fine) for _ in range(shape.blocks)))
        self.norm = nn.GroupNorm(NORM_GROUPS, fine)
        self.head = nn.Conv2d(fine, 3 * shape.temporal_stride * fold**2, 3, padding=1)
        self.unfold = nn.PixelShuffle(fold)

    def forward(self, latents_GChw: Tensor) -> Tensor:
        x = self.fine(self.up(self.coarse(self.stem(latents_GChw))))
        out: Tensor = self.unfold(self.head(fn.silu(self.norm(x))))
        return out


class GroupCodec(Codec):
    """The codec of the tiny preset, with the streaming interface of every decoder here."""

    mean: Tensor
    std: Tensor

    def __init__(self, shape: GroupCodecShape, channels: int) -> None:
        super().__init__(channels, shape.temporal_stride, shape.spatial_stride)
        self.encoder = GroupEncoder(shape, channels)
        self.decoder = GroupDecoder(shape, channels)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    @property
    def rebuild_latents(self) -> int:
        """None: a group is decoded by itself."""
        return 0

    def encode_whole(self, frames_BNCHW: Tensor) -> Tensor:
        """Groups of frames, the first frame being a group of its own, repeated."""
        b, _, _, height, width = frames_BNCHW.shape
        stride = self.temporal_stride
        first = frames_BNCHW[:, :1].expand(-1, stride - 1, -1, -1, -1)
        groups = torch.cat([first, frames_BNCHW], dim=1)
        groups = groups.reshape(-1, 3 * stride, height, width)
        raw = self.encoder(2 * groups - 1)
        latents = (raw - self._per_channel(self.mean)) / self._per_channel(self.std)
        out: Tensor = latents.view(b, -1, *latents.shape[1:])
        return out

    def decode_groups(self, latents_GChw: Tensor) -> Tensor:
        """Normalised latents to unclamped groups [G, 3 * stride, H, W] in [0, 1]."""
        raw = latents_GChw * self._per_channel(self.std) + self._per_channel(self.mean)
        out: Tensor = (self.decoder(raw) + 1) / 2
        return out

    def decode_step(self, latent_BChw: Tensor, history: History) -> Tensor:
        """A group's frames; of the stream's first latent only the last is one of the video."""
        groups_GCHW = self.decode_groups(latent_BChw).float().clamp(0.0, 1.0)
        batch, _, height, width = groups_GCHW.shape
        frames = groups_GCHW.view(batch, self.temporal_stride, 3, height, width)
        return frames[:, -1:] if history.first else frames

    def rebuild(self, latents_BFChw: Tensor, first: bool) -> CodecState:
        """State after the given trailing latents, which need not be decoded for it."""
        nothing = latents_BFChw.shape[1] == 0
        return self.initial_state() if first and nothing else self.midstream_state()

    def _per_channel(self, values_C: Tensor) -> Tensor:
        return values_C[:, None, None]
