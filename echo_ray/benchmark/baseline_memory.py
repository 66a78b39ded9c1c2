"""The baseline's memory encoder, with the reads of its gate that the published loop makes.

Shapes: B batch, M memory tokens, E evicted tokens, H heads, D head size, C width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as fn

from echo_ray.benchmark.baseline_maths import Attend, gelu_mlp, rms_norm
from echo_ray.preset import DiTShape, MemoryShape


@dataclass(frozen=True, slots=True)
class BaselineMemory:
    weights: Mapping[str, Tensor]
    shape: DiTShape
    memory: MemoryShape

    def initial(self, batch: int) -> Tensor:
        return self.weights["query_init"].repeat(batch, 1, 1)

    def updated(self, z_BMC: Tensor, k_BEHD: Tensor, v_BEHD: Tensor, attend: Attend) -> Tensor:
        """The query state after frames with these last-layer keys and values have left."""
        w, z, eps = self.weights, z_BMC, self.shape.eps
        for layer in range(self.memory.encoder_layers):
            p = f"layers.{layer}."
            q = self._linear(rms_norm(z, w[p + "norm1.weight"], eps), p + "q")
            if self.shape.qk_norm:
                q = rms_norm(q, w[p + "norm_q.weight"], eps)
            z = z + self._linear(attend(self._heads(q), k_BEHD, v_BEHD), p + "o")
            y = rms_norm(z, w[p + "norm2.weight"], eps)
            z = z + gelu_mlp(w, p + "ffn.0", p + "ffn.2", y)
        new = gelu_mlp(w, "connector_proj.0", "connector_proj.2", z)
        new = rms_norm(new, w["connector_proj.3.weight"], eps)
        if self.memory.gate:
            gate = self._linear(torch.cat([z_BMC, new], dim=-1), "gate_linear").sigmoid()
            gate.mean().item()
            new = gate * z_BMC + (1 - gate) * new
        new.norm().item()
        return new

    def pair(self, z_BMC: Tensor) -> tuple[Tensor, Tensor]:
        """Un-rotated keys and values [B, M, H, D], projected anew at every call."""
        k = self._linear(z_BMC, "to_k")
        if self.memory.normalize_keys:
            k = rms_norm(k, self.weights["norm_k_out.weight"], self.shape.eps)
        return self._heads(k), self._heads(self._linear(z_BMC, "to_v"))

    def _linear(self, x: Tensor, key: str) -> Tensor:
        return fn.linear(x, self.weights[key + ".weight"], self.weights[key + ".bias"])

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.shape.num_heads, self.shape.head_dim)
