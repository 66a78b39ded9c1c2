"""The codec and the text encoder that can be trained from nothing here."""

from __future__ import annotations

from echo_ray.errors import ConfigError
from echo_ray.model.group_codec import GroupCodec
from echo_ray.model.words import WordTextEncoder
from echo_ray.preset import GroupCodecShape, Preset, WordTextShape


def new_codec(preset: Preset) -> GroupCodec:
    """An untrained codec. Raises `ConfigError` unless the preset's is a group codec."""
    if not isinstance(preset.codec, GroupCodecShape):
        raise ConfigError(
            f"preset {preset.name}: a codec of kind {preset.codec.kind!r} is not trained here; "
            "only group codecs are, and its published weights are converted instead",
            param="codec.kind",
        )
    return GroupCodec(preset.codec, preset.dit.in_channels)


def new_text(preset: Preset) -> WordTextEncoder:
    """An untrained prompt encoder. Raises `ConfigError` unless the preset's reads words."""
    if not isinstance(preset.text, WordTextShape):
        raise ConfigError(
            f"preset {preset.name}: a text encoder of kind {preset.text.kind!r} is not trained "
            "here; only word encoders are, and its published weights are converted instead",
            param="text.kind",
        )
    return WordTextEncoder(preset.text, preset.dit.text_dim, preset.dit.text_len)
