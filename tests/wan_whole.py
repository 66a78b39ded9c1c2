"""The Wan VAE over a whole video at once, from the state dict alone: no state, no steps.

Written from spec section 9's whole-sequence form, apart from the code it checks. Everything is
[B, C, T, H, W]; `w` is a state dict.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as fn

Weights = dict[str, Tensor]


def decode_whole(w: Weights, raw: Tensor) -> Tensor:
    """Raw latents to unclamped pixels."""
    x = conv(w, "conv2", raw)
    x = middle(w, "decoder.middle", conv(w, "decoder.conv1", x))
    for name in layers(w, "decoder.upsamples"):
        x = residual(w, name, x) if f"{name}.residual.2.weight" in w else upsample(w, name, x)
    return head(w, "decoder.head", x)


def encode_whole(w: Weights, pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] to the posterior's mean and log variance."""
    x = conv(w, "encoder.conv1", pixels)
    for name in layers(w, "encoder.downsamples"):
        x = residual(w, name, x) if f"{name}.residual.2.weight" in w else downsample(w, name, x)
    return conv(w, "conv1", head(w, "encoder.head", middle(w, "encoder.middle", x)))


def layers(w: Weights, prefix: str) -> list[str]:
    found = {int(k.removeprefix(f"{prefix}.").split(".")[0]) for k in w if k.startswith(prefix)}
    return [f"{prefix}.{i}" for i in sorted(found)]


def conv(w: Weights, name: str, x: Tensor) -> Tensor:
    weight = w[f"{name}.weight"]
    time, height, width = (k - 1 for k in weight.shape[2:])
    x = fn.pad(x, (width // 2, width // 2, height // 2, height // 2, time, 0))
    return fn.conv3d(x, weight, w[f"{name}.bias"])


def conv_of_frames(w: Weights, name: str, x: Tensor, **how: int) -> Tensor:
    weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    frames = [fn.conv2d(x[:, :, t], weight, bias, **how) for t in range(x.shape[2])]  # type: ignore[arg-type]
    return torch.stack(frames, dim=2)


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    gamma = w[f"{name}.gamma"].reshape(1, -1, 1, 1, 1)
    mean_square = (x * x).mean(dim=1, keepdim=True)
    return x / mean_square.sqrt() * gamma


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def residual(w: Weights, name: str, x: Tensor) -> Tensor:
    y = conv(w, f"{name}.residual.2", silu(norm(w, f"{name}.residual.0", x)))
    y = conv(w, f"{name}.residual.6", silu(norm(w, f"{name}.residual.3", y)))
    return y + (conv(w, f"{name}.shortcut", x) if f"{name}.shortcut.weight" in w else x)


def attention(w: Weights, name: str, x: Tensor) -> Tensor:
    b, c, t, height, width = x.shape
    qkv = conv_of_frames(w, f"{name}.to_qkv", norm(w, f"{name}.norm", x))
    q, k, v = qkv.reshape(b, 3, c, t, height * width).unbind(1)
    scores = torch.einsum("bctp,bctq->btpq", q, k) / c**0.5
    mixed = torch.einsum("btpq,bctq->bctp", scores.softmax(dim=-1), v)
    return x + conv_of_frames(w, f"{name}.proj", mixed.reshape(b, c, t, height, width))


def middle(w: Weights, name: str, x: Tensor) -> Tensor:
    x = attention(w, f"{name}.1", residual(w, f"{name}.0", x))
    return residual(w, f"{name}.2", x)


def head(w: Weights, name: str, x: Tensor) -> Tensor:
    return conv(w, f"{name}.2", silu(norm(w, f"{name}.0", x)))


def upsample(w: Weights, name: str, x: Tensor) -> Tensor:
    if f"{name}.time_conv.weight" in w:
        first, rest = x[:, :, :1], x[:, :, 1:]
        early, late = conv(w, f"{name}.time_conv", rest).chunk(2, dim=1)
        pairs = [frame for t in range(rest.shape[2]) for frame in (early[:, :, t], late[:, :, t])]
        x = torch.cat([first, torch.stack(pairs, dim=2)], dim=2) if pairs else first
    x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    return conv_of_frames(w, f"{name}.resample.1", x, padding=1)


def downsample(w: Weights, name: str, x: Tensor) -> Tensor:
    x = conv_of_frames(w, f"{name}.resample.1", fn.pad(x, (0, 1, 0, 1)), stride=2)
    if f"{name}.time_conv.weight" not in w or x.shape[2] == 1:
        return x
    weight, bias = w[f"{name}.time_conv.weight"], w[f"{name}.time_conv.bias"]
    later = fn.conv3d(x, weight, bias, stride=(2, 1, 1))
    return torch.cat([x[:, :, :1], later], dim=2)
