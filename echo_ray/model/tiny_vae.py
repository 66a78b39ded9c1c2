"""A small autoencoder for the same latents as the Wan VAE, in TAEHV's published layout.

Two-dimensional convolutions, and blocks that see one frame of their own past. Latents come and
go normalised (mean 0, deviation 1), pixels in [0, 1]. The decoder's state is the last frame that
each of those blocks saw. Attribute names are those of the published checkpoint.

Shapes: B batch, N pixel frames, F latent frames, T frames of a step, G = B x T, C channels,
H W pixels, h w latents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from echo_ray.model.codec import Codec, CodecState
from echo_ray.model.history import History, layout_of
from echo_ray.preset import TinyVaeShape

BLOCKS_PER_LEVEL = 3
DECODER_TIME = (1, 2, 2)
ENCODER_TIME = (2, 2, 1)
"""How many frames a frame becomes, or how many become one, at each level."""


class SoftClamp(nn.Module):
    """Keeps latents within (-3, 3), smoothly."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """Three convolutions over a frame and the one before it, added to the frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.key = ""

    def step(self, x_BTCHW: Tensor, history: History) -> Tensor:
        b, t, c, h, w = x_BTCHW.shape
        last_B1CHW = history.past(self.key)
        pair_GCHW = torch.empty(
            (b * t, 2 * c, h, w), dtype=x_BTCHW.dtype, device=x_BTCHW.device,
            memory_format=layout_of(x_BTCHW.flatten(0, 1)),
        )  # fmt: skip
        pair_BTCHW = pair_GCHW.view(b, t, 2 * c, h, w)
        pair_BTCHW[:, :, :c] = x_BTCHW
        pair_BTCHW[:, :1, c:] = 0 if last_B1CHW is None else last_B1CHW
        pair_BTCHW[:, 1:, c:] = x_BTCHW[:, :-1]
        history.keep(self.key, x_BTCHW, 1)
        y_GCHW = fn.relu(self.conv(pair_GCHW) + x_BTCHW.flatten(0, 1))
        return y_GCHW.view_as(x_BTCHW)


class TimePool(nn.Module):
    """Makes `stride` frames one."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(stride * width, width, 1, bias=False)

    def forward(self, x_GCHW: Tensor) -> Tensor:
        _, c, h, w = x_GCHW.shape
        out: Tensor = self.conv(x_GCHW.reshape(-1, self.stride * c, h, w))
        return out


class TimeGrow(nn.Module):
    """Makes one frame `stride`, the earlier ones first."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, stride * width, 1, bias=False)

    def forward(self, x_GCHW: Tensor) -> Tensor:
        _, c, h, w = x_GCHW.shape
        out: Tensor = self.conv(x_GCHW).reshape(-1, c, h, w)
        return out


def encoder_layers(width: int, channels: int) -> nn.Sequential:
    """Pixels to latents: three levels, each half the size of the one before."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for stride in ENCODER_TIME:
        layers.append(TimePool(width, stride))
        layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
        layers.extend(MemoryBlock(width) for _ in range(BLOCKS_PER_LEVEL))
    layers.append(nn.Conv2d(width, channels, 3, padding=1))
    return nn.Sequential(*layers)


def decoder_layers(widths: tuple[int, int, int, int], channels: int) -> nn.Sequential:
    """Latents to pixels: three levels, each twice the size of the one before."""
    layers: list[nn.Module] = [
        SoftClamp(),
        nn.Conv2d(channels, widths[0], 3, padding=1),
        nn.ReLU(),
    ]
    for width, width_out, stride in zip(widths[:-1], widths[1:], DECODER_TIME, strict=True):
        layers.extend(MemoryBlock(width) for _ in range(BLOCKS_PER_LEVEL))
        layers.append(nn.Upsample(scale_factor=2.0, mode="nearest"))
        layers.append(TimeGrow(width, stride))
        layers.append(nn.Conv2d(width, width_out, 3, padding=1, bias=False))
    layers.extend([nn.ReLU(), nn.Conv2d(widths[-1], 3, 3, padding=1)])
    return nn.Sequential(*layers)


class TinyVae(Codec):
    """The small autoencoder with the streaming interface of every codec here."""

    def __init__(self, shape: TinyVaeShape, z_dim: int) -> None:
        super().__init__(z_dim, shape.temporal_stride, shape.spatial_stride)
        self.encoder = encoder_layers(shape.encoder_width, z_dim)
        self.decoder = decoder_layers(shape.decoder_widths, z_dim)
        for name, module in self.named_modules():
            if isinstance(module, MemoryBlock):
                module.key = name

    @property
    def rebuild_latents(self) -> int:
        """The oldest latent that some kept frame of the decoder depends on: 8 from the end.

        From the last level back to the first: each block needs one frame more of its input than
        the block after it, and a temporal up-sampling half as many.
        """
        frames = 0
        for stride in reversed(DECODER_TIME):
            frames = -(-frames // stride) + BLOCKS_PER_LEVEL
        return frames

    def encode_whole(self, frames_BNCHW: Tensor) -> Tensor:
        """Latents of a whole video.

        As published: the last frame is repeated to a multiple of four, so latent t is made of
        frames 4t to 4t + 3, while the decoder gives frames 4t - 3 to 4t for it.
        """
        time = self.temporal_stride
        state: CodecState = {}
        latents: list[Tensor] = []
        for group_BTCHW in torch.split(frames_BNCHW, time, dim=1):
            missing = time - group_BTCHW.shape[1]
            last = group_BTCHW[:, -1:].expand(-1, missing, -1, -1, -1)
            history = History(state, first=not latents, time_dim=self.time_dim)
            whole = torch.cat([group_BTCHW, last], dim=1).to(self._dtype)
            latents.append(run_layers(self.encoder, whole, history))
            state = history.after
        return torch.cat(latents, dim=1)

    def decode_step(self, latent_BChw: Tensor, history: History) -> Tensor:
        """Four frames; of the stream's first latent only the last is one of the video."""
        frames = run_layers(self.decoder, latent_BChw[:, None].to(self._dtype), history)
        frames = frames.float().clamp(0.0, 1.0)
        return frames[:, -1:] if history.first else frames

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def run_layers(layers: nn.Sequential, x_BTCHW: Tensor, history: History) -> Tensor:
    """Run frames through the layers; only memory blocks see more than one at a time."""
    batch = x_BTCHW.shape[0]
    for layer in layers:
        if isinstance(layer, MemoryBlock):
            x_BTCHW = layer.step(x_BTCHW, history)
        else:
            x_GCHW = layer(x_BTCHW.flatten(0, 1))
            x_BTCHW = x_GCHW.view(batch, -1, *x_GCHW.shape[1:])
    return x_BTCHW
