"""Codecs and prompt encoders of a training: those that learn here, and those that only serve it.

Shapes: N prompts, L words, U captions, P rows of a prompt, E text width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from echo_ray.errors import ConfigError
from echo_ray.model.group_codec import GroupCodec
from echo_ray.model.text import TextEncoder
from echo_ray.model.words import WordTextEncoder
from echo_ray.preset import GroupCodecShape, Preset, WordTextShape


class CaptionTable(nn.Module):
    """What a frozen encoder has made of every caption; a caption's only word is its place here.

    It holds nothing that is trained or written, and every copy of a model shares it.
    """

    rows_UPE: Tensor

    def __init__(self, text_dim: int, text_len: int) -> None:
        super().__init__()
        self.text_len = text_len
        self.register_buffer("rows_UPE", torch.zeros(0, 1, text_dim), persistent=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> CaptionTable:
        return self

    def fill(self, captions: tuple[str, ...], encoder: TextEncoder) -> None:
        """Read every caption once. Rows that are zero at the end of all of them are not kept."""
        with torch.no_grad():
            # Clones: what comes from an inference mode may take part in no gradient.
            rows = torch.cat([encoder.encode(caption).float().clone() for caption in captions])
        used = (rows != 0).any(dim=2).any(dim=0).nonzero().flatten()
        self.rows_UPE = rows[:, : int(used[-1]) + 1 if len(used) else 1].to(self.rows_UPE.device)

    def forward(self, ids_NL: Tensor) -> Tensor:
        rows = self.rows_UPE[ids_NL[:, 0]]
        return fn.pad(rows, (0, 0, 0, self.text_len - rows.shape[1]))


def new_codec(preset: Preset) -> GroupCodec:
    """An untrained codec. Raises `ConfigError` unless the preset's is a group codec."""
    if not isinstance(preset.codec, GroupCodecShape):
        raise ConfigError(
            f"preset {preset.name}: a codec of kind {preset.codec.kind!r} is not trained here; "
            "only group codecs are, and its published weights are converted instead",
            param="codec.kind",
        )
    return GroupCodec(preset.codec, preset.dit.in_channels)


def new_text(preset: Preset) -> WordTextEncoder | CaptionTable:
    """An untrained encoder of words; for any other kind a table that its encoder has to fill."""
    dit = preset.dit
    if isinstance(preset.text, WordTextShape):
        return WordTextEncoder(preset.text, dit.text_dim, dit.text_len)
    return CaptionTable(dit.text_dim, dit.text_len)
