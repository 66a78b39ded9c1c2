"""The modules that a preset is made of, by the part of the weights that each one reads."""

from __future__ import annotations

import torch
from torch import nn

from echo_ray.model.codec import Codec
from echo_ray.model.dit import DiT
from echo_ray.model.group_codec import GroupCodec
from echo_ray.model.memory import MemoryEncoder
from echo_ray.model.tiny_vae import TinyVae
from echo_ray.model.umt5 import UMT5Encoder
from echo_ray.model.wan_vae import WanVae
from echo_ray.model.words import WordTextEncoder
from echo_ray.preset import (
    CodecShape,
    DiTShape,
    GroupCodecShape,
    Preset,
    TextShape,
    TinyVaeShape,
    WanVaeShape,
    WordTextShape,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What `dtype` of a preset means."""
PARTS = ("dit", "memory", "text", "codec", "small_codec")
"""Every tensor's key begins with one of these and a dot."""


def build_parts(preset: Preset) -> dict[str, nn.Module]:
    """All modules of a preset with whatever weights their constructors draw.

    Under `torch.device("meta")` they cost no memory, and tell every key and shape.
    """
    dit, memory = preset.dit, preset.cache.memory
    parts: dict[str, nn.Module] = {"dit": DiT(dit)}
    if memory is not None:
        parts["memory"] = MemoryEncoder(dit, memory)
    parts["text"] = build_text(preset.text, dit)
    for codec in (preset.codec, preset.small_codec):
        if codec is not None:
            parts[codec_part(codec)] = build_codec(codec, dit)
    return parts


def codec_part(shape: CodecShape) -> str:
    """Which part holds a codec's weights; a folder may have both."""
    return "small_codec" if isinstance(shape, TinyVaeShape) else "codec"


def build_text(shape: TextShape, dit: DiTShape) -> WordTextEncoder | UMT5Encoder:
    if isinstance(shape, WordTextShape):
        return WordTextEncoder(shape, dit.text_dim, dit.text_len)
    return UMT5Encoder(shape, dit.text_dim)


def build_codec(shape: CodecShape, dit: DiTShape) -> Codec:
    if isinstance(shape, GroupCodecShape):
        return GroupCodec(shape, dit.in_channels)
    if isinstance(shape, WanVaeShape):
        return WanVae(shape, dit.in_channels)
    return TinyVae(shape, dit.in_channels)
