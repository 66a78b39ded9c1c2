"""The modules of a preset with their weights, strictly loaded from a weights folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from echo_ray.errors import ConfigError, WeightsError
from echo_ray.model.codec import Codec
from echo_ray.model.computing import Computing
from echo_ray.model.dit import DiT
from echo_ray.model.memory import MemoryEncoder
from echo_ray.model.state_dict import load_strict
from echo_ray.model.text import TextEncoder
from echo_ray.model.tiny_vae import TinyVae
from echo_ray.model.wan_vae import WanVae
from echo_ray.model.words import WordTextEncoder
from echo_ray.preset import Preset, UMT5Shape
from echo_ray.weights.folder import WeightsFolder
from echo_ray.weights.parts import DTYPES, build_parts, codec_part
from echo_ray.weights.text import UMT5Prompts


@dataclass(frozen=True, slots=True)
class Modules:
    """A model, ready to run; `digest` identifies its weights."""

    dit: DiT
    memory: MemoryEncoder | None
    text: TextEncoder
    codec: Codec
    digest: str
    computing: Computing = field(default_factory=Computing)

    def named(self) -> dict[str, nn.Module]:
        """Those that are modules, by the part of the weights they hold."""
        parts: dict[str, nn.Module] = {"dit": self.dit, "codec": self.codec}
        if isinstance(self.text, nn.Module):
            parts["text"] = self.text
        return parts | ({"memory": self.memory} if self.memory is not None else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPlace:
    """Where prompts are encoded, and whether the encoder stays there between two of them."""

    device: torch.device
    keep: bool = True


def build_modules(preset: Preset, digest: str = "random") -> Modules:
    """A preset's modules with whatever weights their constructors draw.

    Raises `ConfigError` for a preset that reads prompts with umT5: that takes a tokenizer's file.
    """
    parts = build_parts(preset)
    text = parts["text"]
    if not isinstance(text, WordTextEncoder):
        raise ConfigError(
            f"preset {preset.name} encodes prompts with {preset.text.kind}, which needs a weights "
            "folder; make one with echo-ray weights synthesize and convert"
        )
    return _assembled(preset, parts, text, digest)


def load_modules(
    preset: Preset, folder: WeightsFolder, device: torch.device, text: TextPlace | None = None
) -> Modules:
    """Read every weight of the preset; anything missing, surplus or misshapen is an error.

    umT5 is read when the first prompt asks for it. Raises `WeightsError`.
    """
    dtype = DTYPES[preset.dtype]
    with torch.device("meta"):
        parts = build_parts(preset)
    place = text or TextPlace(device=device)
    encoder: TextEncoder | None = None
    if isinstance(preset.text, UMT5Shape):
        del parts["text"]
        encoder = UMT5Prompts(preset, folder, place.device, device, keep=place.keep)
    for name, module in parts.items():
        if not folder.has(name):
            raise WeightsError(
                f"{folder.path}: holds no weights of {name}; convert again with its file beside "
                "the others"
            )
        load_strict(module, folder.part(name, dtype=dtype, device=device), f"{folder.path}, {name}")
        module.eval().requires_grad_(requires_grad=False)
        lay_out(module, device)
    words = parts.get("text")
    if isinstance(words, WordTextEncoder):
        encoder = words
    if encoder is None:
        raise ConfigError(f"preset {preset.name}: text.kind {preset.text.kind!r} has no encoder")
    return _assembled(preset, parts, encoder, folder.digest)


def lay_out(module: nn.Module, device: torch.device) -> None:
    """Lay a video codec's weights out as its device reads them; a CPU's stay as they are."""
    if isinstance(module, WanVae | TinyVae) and device.type == "cuda":
        module.lie_channels_last()


def _assembled(
    preset: Preset, parts: Mapping[str, nn.Module], text: TextEncoder, digest: str
) -> Modules:
    dit, memory, codec = parts["dit"], parts.get("memory"), parts[codec_part(preset.codec)]
    if not isinstance(dit, DiT) or not isinstance(codec, Codec):
        raise ConfigError(f"preset {preset.name} has no transformer or no codec")
    return Modules(dit, memory if isinstance(memory, MemoryEncoder) else None, text, codec, digest)
