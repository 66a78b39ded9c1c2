"""umT5 as a prompt encoder: read at the first prompt, let go of after one if memory is short."""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor

from echo_ray.errors import ConfigError
from echo_ray.model.state_dict import load_strict
from echo_ray.model.tokens import PromptTokenizer
from echo_ray.model.umt5 import UMT5Encoder
from echo_ray.preset import Preset, UMT5Shape
from echo_ray.weights.folder import WeightsFolder
from echo_ray.weights.parts import DTYPES

LOG = logging.getLogger(__name__)


class UMT5Prompts:
    """Implements `echo_ray.model.text.TextEncoder`.

    On a CPU the weights stay mapped from their file, so that what the system needs more it can take
    back at any time; on a GPU they are 11 GB that `keep=False` frees after every new prompt.
    """

    def __init__(
        self,
        preset: Preset,
        folder: WeightsFolder,
        device: torch.device,
        target: torch.device,
        *,
        keep: bool,
    ) -> None:
        if not isinstance(preset.text, UMT5Shape):
            raise ConfigError(f"preset {preset.name}: text.kind is not umt5")
        self._shape, self._dit = preset.text, preset.dit
        self._dtype = DTYPES[preset.dtype]
        self._folder, self._device, self._target, self._keep = folder, device, target, keep
        self._model: UMT5Encoder | None = None
        length, vocab = preset.dit.text_len, preset.text.vocab
        self._tokens = PromptTokenizer.from_folder(folder.tokenizer, length, vocab)

    @property
    def loaded(self) -> bool:
        """Whether the encoder's weights are held between two prompts."""
        return self._model is not None

    def encode(self, prompt: str) -> Tensor:
        ids, mask = self._tokens(prompt)
        model = self._model or self._load()
        with torch.inference_mode():
            rows = model.encode_ids(ids, mask)
        if self._keep:
            self._model = model
        return rows.to(self._target, self._dtype)

    def understood(self, prompt: str) -> tuple[list[str], list[str]]:
        return self._tokens.understood(prompt)

    def _load(self) -> UMT5Encoder:
        began_s = time.perf_counter()
        with torch.device("meta"):
            model = UMT5Encoder(self._shape, self._dit.text_dim)
        tensors = self._folder.part("text", dtype=self._dtype, device=self._device)
        load_strict(model, tensors, f"{self._folder.path}, text")
        LOG.info("text encoder on %s in %.1f s", self._device, time.perf_counter() - began_s)
        return model.eval().requires_grad_(requires_grad=False)
