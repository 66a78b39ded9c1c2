"""The blocks of the Wan2.1 VAE (spec section 9): causal in time, ordinary in space.

Every block takes and returns [B, C, T, H, W]; those that look back take a `History` as well.
Attribute names and positions are those of the published checkpoint.

Shapes: B batch, C channels, T frames of the level at hand, H W of the level at hand.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from echo_kernels import norm_silu_join
from echo_ray.model.history import History, layout_of

CONV_PAST = 2
"""Frames before the current one that a causal convolution sees."""


class ChannelNorm(nn.Module):
    """Scales each position's channels to the length sqrt(C), times a learned gain."""

    def __init__(self, width: int, dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = fn.normalize(x, dim=1) * (self.gamma.shape[0] ** 0.5) * self.gamma
        return out


class CausalConv(nn.Conv3d):
    """A convolution over the current and the last two frames, of the same size in space.

    One 3-D convolution reads T + 2 frames to make T. As a 2-D one, with the three taps side by side
    as channels, it would read 3 T, which somebody has to write first; as three, added up, it would
    round between the taps.
    """

    def __init__(self, width_in: int, width_out: int, space: int = 3) -> None:
        super().__init__(
            width_in, width_out, (CONV_PAST + 1, space, space), padding=(0, space // 2, space // 2)
        )
        self.key = ""

    def step(self, x_BCTHW: Tensor, history: History) -> Tensor:
        out: Tensor = self(history.join(self.key, x_BCTHW, CONV_PAST))
        return out

    def step_normed(self, x_BCTHW: Tensor, norm: ChannelNorm, history: History) -> Tensor:
        """The convolution of silu(norm(x)); its past holds what was normed."""
        past_BCPHW = history.past(self.key)
        kept_BCPHW = history.room(self.key, x_BCTHW, CONV_PAST)
        out: Tensor = self(norm_silu_join(x_BCTHW, norm.gamma.flatten(), past_BCPHW, kept_BCPHW))
        return out


class ResidualBlock(nn.Module):
    """Two normed causal convolutions, added to the input."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": ChannelNorm(width_in, 3),
                "2": CausalConv(width_in, width_out),
                "3": ChannelNorm(width_out, 3),
                "6": CausalConv(width_out, width_out),
            }
        )
        self.shortcut: nn.Module = nn.Identity()
        if width_in != width_out:
            self.shortcut = nn.Conv3d(width_in, width_out, 1)

    def step(self, x_BCTHW: Tensor, history: History) -> Tensor:
        y = x_BCTHW
        for index in (("0", "2"), ("3", "6")):
            norm, conv = (self.residual[i] for i in index)
            y = cast(CausalConv, conv).step_normed(y, cast(ChannelNorm, norm), history)
        out: Tensor = self.shortcut(x_BCTHW) + y
        return out


class FrameAttention(nn.Module):
    """One head of attention among the positions of a frame; frames do not see each other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width, 2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def step(self, x_BCTHW: Tensor, history: History) -> Tensor:
        x = _frames_apart(x_BCTHW)
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None]
        y = fn.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        y = self.proj(y[:, 0].transpose(1, 2).reshape(x.shape))
        return _frames_together(x + y, x_BCTHW.shape[0])


class Upsample(nn.Module):
    """Twice the size and half the channels; with `time`, twice the frames but for the first."""

    def __init__(self, width: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest"),
            nn.Conv2d(width, width // 2, 3, padding=1),
        )
        self.time_conv = CausalConv(width, 2 * width, space=1) if time else None

    def step(self, x_BCTHW: Tensor, history: History) -> Tensor:
        # The first latent is one frame and leaves no trace: the second one sees zeros before it.
        if self.time_conv is not None and not history.first:
            b, c, t, h, w = x_BCTHW.shape
            pairs = self.time_conv.step(x_BCTHW, history)
            x_BCTHW = torch.empty(
                (b, c, 2 * t, h, w), dtype=pairs.dtype, device=pairs.device,
                memory_format=layout_of(pairs),
            )  # fmt: skip
            early_and_late = pairs.view(b, 2, c, t, h, w).permute(0, 2, 3, 1, 4, 5)
            x_BCTHW.view(b, c, t, 2, h, w).copy_(early_and_late)
        return _frames_together(self.resample(_frames_apart(x_BCTHW)), x_BCTHW.shape[0])


class Downsample(nn.Module):
    """Half the size; with `time`, half the frames but for the first, which passes unchanged."""

    def __init__(self, width: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2)
        )
        self.time_conv = nn.Conv3d(width, width, (3, 1, 1), stride=(2, 1, 1)) if time else None
        self.key = ""

    def step(self, x_BCTHW: Tensor, history: History) -> Tensor:
        x = _frames_together(self.resample(_frames_apart(x_BCTHW)), x_BCTHW.shape[0])
        if self.time_conv is None:
            return x
        if history.first:
            history.keep(self.key, x, 1)
            return x
        out: Tensor = self.time_conv(history.join(self.key, x, 1))
        return out


Block = ResidualBlock | FrameAttention | Upsample | Downsample


def run_blocks(blocks: nn.ModuleList, x_BCTHW: Tensor, history: History) -> Tensor:
    for block in blocks:
        x_BCTHW = cast(Block, block).step(x_BCTHW, history)
    return x_BCTHW


def middle_blocks(width: int) -> nn.ModuleList:
    """What lies between the encoder's or the decoder's stem and its levels, at latent size."""
    return nn.ModuleList(
        [ResidualBlock(width, width), FrameAttention(width), ResidualBlock(width, width)]
    )


def name_histories(part: nn.Module) -> None:
    """Give every layer that looks back the key of its past: its own name in `part`."""
    for name, module in part.named_modules():
        if isinstance(module, CausalConv | Downsample):
            module.key = name


def _frames_apart(x_BCTHW: Tensor) -> Tensor:
    return x_BCTHW.transpose(1, 2).flatten(0, 1)


def _frames_together(x_GCHW: Tensor, batch: int) -> Tensor:
    return x_GCHW.view(batch, -1, *x_GCHW.shape[1:]).transpose(1, 2)
