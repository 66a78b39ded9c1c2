"""The formulas of the baseline, each as the published code writes it: one pass after another.

Shapes: B batch, N tokens, H heads, D head size, P = D / 2 complex pairs, F frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as fn

from echo_ray.preset import DiTShape, Preset

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [B, N, H, D], keys and values [B, M, H, D] -> [B, N, C], as `model.backends` has it."""

_ROPE_BASE = 10_000.0
_LEVELS = 1000


def attend_plain(q_BNHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
    """PyTorch's own attention, whichever kernel it chooses."""
    out = fn.scaled_dot_product_attention(
        q_BNHD.transpose(1, 2), k_BMHD.transpose(1, 2), v_BMHD.transpose(1, 2)
    )
    return out.transpose(1, 2).flatten(2)


@dataclass(frozen=True, slots=True)
class Turns:
    """Complex factors of every position up to the limit, by section, and the published rotation."""

    frames_LP: Tensor
    rows_LP: Tensor
    columns_LP: Tensor
    grid: tuple[int, int]

    @classmethod
    def of(cls, preset: Preset, device: torch.device) -> Turns:
        s = preset.dit
        pairs = s.head_dim // 2
        third = pairs // 3

        def table(count: int, sections: int) -> Tensor:
            rate = _ROPE_BASE ** (-torch.arange(sections, dtype=torch.float64) / max(sections, 1))
            angle = torch.outer(torch.arange(count, dtype=torch.float64), rate)
            return torch.polar(torch.ones_like(angle), angle).to(device)

        limit = preset.cache.position_limit
        return cls(
            table(limit, pairs - 2 * third),
            table(s.grid_height, third),
            table(s.grid_width, third),
            (s.grid_height, s.grid_width),
        )

    def turn(self, x_BNHD: Tensor, first: int) -> Tensor:
        """Rotate whole frames that stand at `first`, `first` + 1, ...; rounded once, at the end."""
        rows, columns = self.grid
        frames = x_BNHD.shape[1] // (rows * columns)
        size = (frames, rows, columns, -1)
        factors = torch.cat(
            [
                self.frames_LP[first : first + frames, None, None].expand(size),
                self.rows_LP[None, :, None].expand(size),
                self.columns_LP[None, None].expand(size),
            ],
            dim=-1,
        ).reshape(frames * rows * columns, 1, -1)
        out = []
        for x_NHD in x_BNHD:
            pairs = torch.view_as_complex(x_NHD.double().view(*x_NHD.shape[:-1], -1, 2))
            turned = torch.view_as_real(pairs * factors).flatten(2)
            out.append(torch.cat([turned, x_NHD[turned.shape[0] :]]))
        return torch.stack(out).type_as(x_BNHD)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(dim=-1, keepdim=True) + eps)).type_as(x) * weight


def layer_norm(
    x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """In float32, rounded after it."""
    gain = None if weight is None else weight.float()
    shift = None if bias is None else bias.float()
    return fn.layer_norm(x.float(), x.shape[-1:], gain, shift, eps).type_as(x)


def gelu_mlp(weights: Mapping[str, Tensor], first: str, second: str, x: Tensor) -> Tensor:
    y = fn.linear(x, weights[first + ".weight"], weights[first + ".bias"])
    y = fn.gelu(y, approximate="tanh")
    return fn.linear(y, weights[second + ".weight"], weights[second + ".bias"])


def sinusoid(t: Tensor, size: int) -> Tensor:
    """Embedding [len(t), size] of timesteps, in float64."""
    half = size // 2
    i = torch.arange(half, dtype=torch.float64, device=t.device)
    wave = torch.outer(t.double(), torch.pow(_ROPE_BASE, -i / half))
    return torch.cat([torch.cos(wave), torch.sin(wave)], dim=1)


def sigma_of(t_BF: Tensor, shift: float) -> Tensor:
    """Noise level [B, F, 1, 1, 1] of the nearest entry of the schedule, found on the device."""
    u = 1 - torch.arange(_LEVELS, dtype=torch.float64, device=t_BF.device) / _LEVELS
    sigmas = (shift * u / (1 + (shift - 1) * u)).float().double()
    nearest = (sigmas * _LEVELS - t_BF.double().unsqueeze(-1)).abs().argmin(dim=-1)
    return sigmas[nearest][..., None, None, None]


def unpatchify(y_BNV: Tensor, frames: int, s: DiTShape) -> Tensor:
    _, ph, pw = s.patch_size
    y = y_BNV.view(-1, frames, s.grid_height, s.grid_width, ph, pw, s.out_channels)
    y = torch.einsum("bfhwpqc->bfchpwq", y)
    return y.reshape(-1, frames, s.out_channels, s.latent_height, s.latent_width)
