"""The causal Wan2.1 diffusion transformer (spec section 3). One class for every cache policy.

Shapes: B batch, F frames, T tokens per frame, N = F * T tokens, C width, H W latent size, P text
tokens, V modulation vectors. Module names are those of the published checkpoint (spec section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from echo_kernels import layernorm_modulate
from echo_kernels.gated_residual_norm import residual
from echo_ray.model.attention import CrossAttention, KVCall, SelfAttention
from echo_ray.model.linear8 import EXACT, Activation, Producers
from echo_ray.preset import DiTShape

Modulation = tuple[Tensor, ...]
"""Shift, scale and gate of self-attention, then of the feed-forward, each [B, F, C]."""


@dataclass(frozen=True, slots=True)
class TimeCondition:
    """What a timestep per frame becomes: e [B, F, C] and its six-way projection [B, F, 6, C]."""

    e_BFC: Tensor
    e0_BF6C: Tensor


@dataclass(frozen=True, slots=True)
class Modulations:
    """What a timestep makes of every block and of the head, one tensor so that one copy moves it.

    Six vectors a block (shift, scale, gate of self-attention, then of the feed-forward), and shift
    and scale of the head.
    """

    table_VBFC: Tensor

    def block(self, layer: int) -> Modulation:
        return self.table_VBFC[6 * layer : 6 * layer + 6].unbind(0)

    def following(self, layer: int) -> tuple[Tensor, Tensor]:
        """Shift and scale of what comes after a block: the next one's first, or the head's."""
        shift, scale = self.table_VBFC[6 * layer + 6 : 6 * layer + 8].unbind(0)
        return shift, scale


@dataclass(frozen=True, slots=True)
class PromptKV:
    """Cross-attention keys and values of one prompt, a pair [B, P, heads, head size] per layer."""

    layers: tuple[tuple[Tensor, Tensor], ...]


class Block(nn.Module):
    def __init__(self, shape: DiTShape) -> None:
        super().__init__()
        dim = shape.dim
        self.eps = shape.eps
        self.producers: Producers = EXACT
        self.next_producers: Producers = EXACT
        """Of what this block's linear layers take, and of what those of the next one do."""
        self.self_attn = SelfAttention(dim, shape.num_heads, shape.eps, shape.qk_norm)
        self.norm3 = nn.LayerNorm(dim, shape.eps) if shape.cross_attn_norm else nn.Identity()
        self.cross_attn = CrossAttention(dim, shape.num_heads, shape.eps, shape.qk_norm)
        self.ffn = nn.Sequential(
            nn.Linear(dim, shape.ffn_dim), nn.GELU("tanh"), nn.Linear(shape.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x_BNC: Tensor,
        h_BNC: Activation,
        modulation: Modulation,
        following: tuple[Tensor, Tensor],
        prompt: tuple[Tensor, Tensor],
        call: KVCall,
        layer: int,
    ) -> tuple[Tensor, Activation]:
        """The stream and its next norm, from the stream and `h`, this block's first norm of it.

        `following`: shift and scale of what comes next, another block or the head.
        """
        _, _, gate1, shift2, scale2, gate2 = modulation
        y_BNC = self.self_attn(h_BNC, call, layer)
        x_BNC, h_BNC = self._into_cross(x_BNC, y_BNC, gate1)
        y_BNC = self.cross_attn(h_BNC, *prompt)
        into_ffn = self.producers.residual_modulate
        x_BNC, h_BNC = into_ffn(x_BNC, y_BNC, None, shift2, scale2, self.eps)
        into_next = self.next_producers.residual_modulate
        return into_next(x_BNC, self.ffn(h_BNC), gate2, *following, self.eps)

    def modulated(self, e0_BF6C: Tensor) -> Modulation:
        return (self.modulation + e0_BF6C).unbind(2)

    def _into_cross(
        self, x_BNC: Tensor, y_BNC: Tensor, gate_BFC: Tensor
    ) -> tuple[Tensor, Activation]:
        norm = self.norm3
        if isinstance(norm, nn.LayerNorm):
            into_cross = self.producers.residual_layernorm
            return into_cross(x_BNC, y_BNC, gate_BFC, norm.weight, norm.bias, norm.eps)
        x_BNC = residual(x_BNC, y_BNC, gate_BFC)
        return x_BNC, x_BNC


class Head(nn.Module):
    """Modulated by the width-C embedding itself, not by its six-way projection."""

    def __init__(self, shape: DiTShape) -> None:
        super().__init__()
        self.eps = shape.eps
        patch = shape.patch_size[0] * shape.patch_size[1] * shape.patch_size[2]
        self.head = nn.Linear(shape.dim, patch * shape.out_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, shape.dim) / shape.dim**0.5)

    def forward(self, x_BNC: Tensor, e_BFC: Tensor) -> Tensor:
        out: Tensor = self.head(layernorm_modulate(x_BNC, *self.modulated(e_BFC), self.eps))
        return out

    def modulated(self, e_BFC: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale [B, F, C]."""
        shift, scale = (self.modulation + e_BFC.unsqueeze(2)).unbind(2)
        return shift, scale


def sinusoid(t_BF: Tensor, freq_dim: int) -> Tensor:
    """Timestep embedding [B, F, freq_dim], cosines first, in float64."""
    half = freq_dim // 2
    i = torch.arange(half, dtype=torch.float64, device=t_BF.device)
    angles = t_BF.to(torch.float64).unsqueeze(-1) * 10_000.0 ** (-i / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class DiT(nn.Module):
    """Predicts the flow (noise - clean) of a chunk; sees the past only through a `KVCall`."""

    def __init__(self, shape: DiTShape) -> None:
        super().__init__()
        dim = shape.dim
        self.shape = shape
        self.patch_embedding = nn.Conv3d(
            shape.in_channels, dim, kernel_size=shape.patch_size, stride=shape.patch_size
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(shape.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(shape.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.head = Head(shape)

    def condition(self, t_BF: Tensor) -> TimeCondition:
        """Embed one timestep per frame (a raw timestep from 0 to 1000)."""
        dtype = self.patch_embedding.weight.dtype
        e_BFC = self.time_embedding(sinusoid(t_BF, self.shape.freq_dim).to(dtype))
        e0_BF6C = self.time_projection(e_BFC).view(*e_BFC.shape[:2], 6, -1)
        return TimeCondition(e_BFC, e0_BF6C)

    def encode_prompt(self, text_BPE: Tensor) -> PromptKV:
        """Keys and values of prompt embeddings [B, P, text_dim], padding included, per layer."""
        context_BPC = self.text_embedding(text_BPE)
        return PromptKV(
            tuple(block.cross_attn.keys_values(context_BPC) for block in self.all_blocks())
        )

    def modulations(self, time: TimeCondition) -> Modulations:
        """What the blocks and the head make of a timestep; the same for every chunk."""
        vectors = [v for block in self.all_blocks() for v in block.modulated(time.e0_BF6C)]
        return Modulations(torch.stack([*vectors, *self.head.modulated(time.e_BFC)]))

    def forward(
        self, x_BFCHW: Tensor, modulations: Modulations, prompt: PromptKV, call: KVCall
    ) -> Tensor:
        """Flow of the same layout as the input."""
        x_BNC, h_BNC = self._patches(x_BFCHW, modulations)
        for layer, block in enumerate(self.all_blocks()):
            x_BNC, h_BNC = block(
                x_BNC, h_BNC, modulations.block(layer), modulations.following(layer),
                prompt.layers[layer], call, layer,
            )  # fmt: skip
        return self._unpatchify(self.head.head(h_BNC), x_BFCHW.shape[1])

    def remember(
        self, x_BFCHW: Tensor, modulations: Modulations, prompt: PromptKV, call: KVCall
    ) -> None:
        """Leave the keys and values of a forward behind, and compute nothing that only its flow
        needs: of the last block that is all but two projections."""
        x_BNC, h_BNC = self._patches(x_BFCHW, modulations)
        *before, last = self.all_blocks()
        for layer, block in enumerate(before):
            x_BNC, h_BNC = block(
                x_BNC, h_BNC, modulations.block(layer), modulations.following(layer),
                prompt.layers[layer], call, layer,
            )  # fmt: skip
        last.self_attn.write(h_BNC, call, len(before))

    def _patches(self, x_BFCHW: Tensor, modulations: Modulations) -> tuple[Tensor, Activation]:
        """The stream before the first block, and that block's norm of it."""
        x_BNC = self.patch_embedding(x_BFCHW.transpose(1, 2)).flatten(2).transpose(1, 2)
        shift, scale, *_ = modulations.block(0)
        producers = self.all_blocks()[0].producers
        return x_BNC, producers.layernorm_modulate(x_BNC, shift, scale, self.shape.eps)

    def all_blocks(self) -> list[Block]:
        return [b for b in self.blocks if isinstance(b, Block)]

    def _unpatchify(self, y_BNV: Tensor, frames: int) -> Tensor:
        s = self.shape
        _, ph, pw = s.patch_size
        y = y_BNV.view(-1, frames, s.grid_height, s.grid_width, ph, pw, s.out_channels)
        y = y.permute(0, 1, 6, 2, 4, 3, 5)
        return y.reshape(-1, frames, s.out_channels, s.latent_height, s.latent_width)
