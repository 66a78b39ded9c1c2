"""One weights file: every tensor of a preset in half precision, under its module's prefix."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from echo_ray.errors import WeightsError
from echo_ray.model.group_codec import GroupCodec


def write_weights(model: nn.Module, codec: GroupCodec, file: Path) -> None:
    """Write `dit.`, `memory.` and `text.` of the model and `codec.` of the codec."""
    tensors = {**model.state_dict(), **{f"codec.{k}": v for k, v in codec.state_dict().items()}}
    halves = {k: _half(k, v) for k, v in tensors.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    save_file(halves, part)
    part.replace(file)


def _half(name: str, value: Tensor) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise WeightsError(f"{name}: holds values that are not finite; the training diverged")
    return value.detach().half().contiguous()
