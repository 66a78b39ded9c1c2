"""Low-rank changes of the linear layers in the blocks, trained in place of the layers.

The layer is W + scale B A. Keys of the factors are those of published adapters, so what is written
here is what `echo_ray.weights.lora` merges.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from echo_ray.model.dit import DiT
from echo_ray.training.recipe import LoraSection
from echo_ray.weights.lora import LINEARS, merged

PREFIX = "base_model.model."


class LoraLinear(nn.Linear):
    """A linear layer whose own weight stays as it is."""

    def __init__(self, whole: nn.Linear, section: LoraSection) -> None:
        super().__init__(
            whole.in_features, whole.out_features, bias=whole.bias is not None, device="meta"
        )
        self.weight, self.bias = whole.weight, whole.bias
        self.scale = section.scale
        place = whole.weight.device
        self.lora_A = nn.Linear(self.in_features, section.rank, bias=False, device=place)
        self.lora_B = nn.Linear(section.rank, self.out_features, bias=False, device=place)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.lora_B(self.lora_A(x))
        return super().forward(x) + self.scale * change

    def merged_weight(self) -> Tensor:
        return merged(self.weight, self.lora_A.weight, self.lora_B.weight, self.scale)


def add_lora(dit: DiT, section: LoraSection) -> None:
    """Freeze the transformer and give every linear layer of its blocks a trained change."""
    dit.requires_grad_(requires_grad=False)
    for block in dit.blocks:
        for name in LINEARS:
            parent, _, child = name.rpartition(".")
            layer = block.get_submodule(name)
            if isinstance(layer, nn.Linear):
                setattr(block.get_submodule(parent), child, LoraLinear(layer, section))


def adapter_tensors(dit: DiT) -> dict[str, Tensor]:
    """The factors under the keys of a published adapter; nothing without a LoRA."""
    values = dit.state_dict()
    return {f"{PREFIX}{key}": value for key, value in values.items() if ".lora_" in key}


def merged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors as it would be without LoRA, every change added into its weight."""
    values = {k: v for k, v in model.state_dict().items() if ".lora_" not in k}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            values[f"{name}.weight"] = module.merged_weight()
    return values
