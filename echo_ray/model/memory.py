"""The learned memory: a query state updated by attention and a gate (paper section 3, spec 6).

Shapes: B batch, M = Q * T memory tokens, E evicted tokens, H heads, D head size, C width. Module
names are those of the published checkpoint (spec section 2.3). Holds weights, never a state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from echo_kernels import memory_gate_blend
from echo_ray.model.attention import Attend, RMSNorm, attention, split_heads
from echo_ray.preset import DiTShape, MemoryShape


class EncoderLayer(nn.Module):
    """Reads evicted keys and values as they are: no projection, no rope, no mask."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, eps: float, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attend: Attend = attention
        self.norm1 = RMSNorm(dim, eps)
        self.q = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.o = nn.Linear(dim, dim)
        self.norm2 = RMSNorm(dim, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))

    def forward(self, z_BMC: Tensor, k_BEHD: Tensor, v_BEHD: Tensor) -> Tensor:
        q_BMC = self.norm_q(self.q(self.norm1(z_BMC)))
        read = self.attend(split_heads(q_BMC, self.num_heads), k_BEHD, v_BEHD)
        z_BMC = z_BMC + self.o(read)
        out: Tensor = z_BMC + self.ffn(self.norm2(z_BMC))
        return out


class MemoryEncoder(nn.Module):
    """What frames leave behind when they leave the local window."""

    def __init__(self, dit: DiTShape, memory: MemoryShape) -> None:
        super().__init__()
        dim, eps = dit.dim, dit.eps
        self.num_heads = dit.num_heads
        ffn_dim = memory.ffn_dim or 4 * dim
        tokens = memory.frames * dit.tokens_per_frame
        self.query_init = nn.Parameter(torch.randn(1, tokens, dim) * 0.014)
        self.layers = nn.ModuleList(
            EncoderLayer(dim, dit.num_heads, ffn_dim, eps, dit.qk_norm)
            for _ in range(memory.encoder_layers)
        )
        self.connector_proj = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim), RMSNorm(dim, eps)
        )
        self.gate_linear = nn.Linear(2 * dim, dim) if memory.gate else None
        if self.gate_linear is not None:
            nn.init.constant_(self.gate_linear.bias, 2.0)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.norm_k_out = RMSNorm(dim, eps) if memory.normalize_keys else None

    def initial(self, batch: int) -> Tensor:
        """The state after a reset, [B, M, C]; it is never attended before the first update."""
        return self.query_init.expand(batch, -1, -1).clone()

    def update(self, q_BMC: Tensor, k_BEHD: Tensor, v_BEHD: Tensor) -> Tensor:
        """The state after frames with these last-layer keys and values have left the window."""
        z_BMC = q_BMC
        for layer in self.layers:
            z_BMC = layer(z_BMC, k_BEHD, v_BEHD)
        candidate: Tensor = self.connector_proj(z_BMC)
        if self.gate_linear is None:
            return candidate
        logits_BMC = self.gate_linear(torch.cat([q_BMC, candidate], dim=-1))
        return memory_gate_blend(logits_BMC, q_BMC, candidate)

    def read_out(self, q_BMC: Tensor) -> tuple[Tensor, Tensor]:
        """Un-rotated keys and values [B, M, H, D], one pair for all layers."""
        k_BMC, v_BMC = self.to_k(q_BMC), self.to_v(q_BMC)
        if self.norm_k_out is not None:
            k_BMC = self.norm_k_out(k_BMC)
        return split_heads(k_BMC, self.num_heads), split_heads(v_BMC, self.num_heads)
