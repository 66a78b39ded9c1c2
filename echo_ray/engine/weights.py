"""The modules of a preset with their weights, strictly loaded from one safetensors file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from echo_ray.errors import WeightsError
from echo_ray.model.group_codec import GroupCodec
from echo_ray.model.dit import DiT
from echo_ray.model.memory import MemoryEncoder
from echo_ray.model.state_dict import load_strict
from echo_ray.model.words import WordTextEncoder
from echo_ray.preset import Preset

FILE = "weights.safetensors"


@dataclass(frozen=True, slots=True)
class Modules:
    """A model, ready to run; `digest` identifies its weights."""

    dit: DiT
    memory: MemoryEncoder | None
    text: WordTextEncoder
    codec: GroupCodec
    digest: str

    def named(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {"dit": self.dit, "text": self.text, "codec": self.codec}
        return parts | ({"memory": self.memory} if self.memory is not None else {})


def build_modules(preset: Preset, digest: str = "random") -> Modules:
    """A preset's modules with whatever weights their constructors draw."""
    cache, dit = preset.cache, preset.dit
    return Modules(
        dit=DiT(dit),
        memory=MemoryEncoder(dit, cache.memory) if cache.memory else None,
        text=WordTextEncoder(preset.text, dit.text_dim, dit.text_len),
        codec=GroupCodec(preset.codec, dit.in_channels),
        digest=digest,
    )


def load_modules(preset: Preset, file: Path, device: torch.device) -> Modules:
    """Read every weight of the preset; anything missing, surplus or misshapen is an error."""
    try:
        with safe_open(file, framework="pt") as f:
            tensors: dict[str, Tensor] = {k: f.get_tensor(k).float() for k in f.keys()}  # noqa: SIM118
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except (OSError, SafetensorError) as e:
        raise WeightsError(f"{file}: weights cannot be read: {e}; install the package again") from e
    modules = build_modules(preset, digest)
    for name, module in modules.named().items():
        prefix = f"{name}."
        own = {
            k.removeprefix(prefix): tensors.pop(k) for k in list(tensors) if k.startswith(prefix)
        }
        load_strict(module, own, f"{file.name}, {name}")
        module.eval().requires_grad_(requires_grad=False).to(device)
    if tensors:
        raise WeightsError(f"{file}: surplus tensors: {', '.join(sorted(tensors)[:8])}")
    return modules
