"""Clips rendered and encoded once: latents and prompt ids to train the transformer from.

Shapes: S clips, F latent frames of a clip, K chunks, C channels, h w latents, L words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from echo_ray.model.group_codec import GroupCodec
from echo_ray.model.words import padded_ids
from echo_ray.preset import Preset
from echo_ray.scenes.clips import Clip, make_clip
from echo_ray.scenes.world import render
from echo_ray.training.recipe import Recipe
from echo_ray.training.trainable import new_codec

Singles = NDArray[np.float32]
Halves = NDArray[np.float16]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Bank:
    """Every training clip: latents in half precision and word ids of each chunk's caption."""

    latents_SFChw: Tensor
    ids_SKL: Tensor
    digest: str
    """Of the encoder and the recipe that made it."""


def clip_of(preset: Preset, recipe: Recipe, index: int) -> Clip:
    """Training clip `index`: a function of the seed and the index alone."""
    rng = np.random.default_rng([recipe.seed, 1, index])
    size = min(preset.height, preset.width)
    return make_clip(rng, recipe.chunks, size, preset.first_chunk_frames, preset.frames_per_chunk)


def bank_digest(codec: GroupCodec, recipe: Recipe) -> str:
    """Names the encoder's weights and the clips; another value means another bank."""
    total = hashlib.sha256(f"{recipe.seed} {recipe.clips} {recipe.chunks}".encode())
    for name, value in sorted(codec.state_dict().items()):
        if not name.startswith("decoder."):
            total.update(name.encode() + value.float().numpy().tobytes())
    return total.hexdigest()[:16]


def load_or_build(
    preset: Preset, recipe: Recipe, codec: GroupCodec, file: Path, workers: int = 1
) -> Bank:
    """Read the bank if it was made by this encoder and recipe; else build and write it."""
    digest = bank_digest(codec, recipe)
    if file.exists():
        body = torch.load(file, weights_only=True, mmap=True)
        if body["digest"] == digest:
            return Bank(body["latents"], body["ids"], digest)
    bank = build(preset, recipe, codec, digest, workers)
    body = {"latents": bank.latents_SFChw, "ids": bank.ids_SKL, "digest": digest}
    part = file.with_suffix(".part")
    torch.save(body, part)
    part.replace(file)
    return bank


def build(preset: Preset, recipe: Recipe, codec: GroupCodec, digest: str, workers: int) -> Bank:
    """Render and encode every clip, in as many processes as `workers` if more than one."""
    pieces = [range(i, min(i + 20, recipe.clips)) for i in range(0, recipe.clips, 20)]
    latents: list[Tensor] = []
    ids: list[Tensor] = []
    state = {k: v.numpy() for k, v in codec.state_dict().items()}
    encode = partial(_encode_piece, preset, recipe, state)
    with ExitStack() as stack:
        made: Iterable[tuple[Halves, Bytes]] = map(encode, pieces)
        if workers > 1:
            pool = ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,))
            made = stack.enter_context(pool).map(encode, pieces)
        for piece_latents, piece_ids in tqdm(made, "bank", len(pieces), mininterval=5.0):
            latents.append(torch.from_numpy(piece_latents))
            ids.append(torch.from_numpy(piece_ids))
    return Bank(torch.cat(latents), torch.cat(ids), digest)


@torch.no_grad()
def encode_clip(preset: Preset, codec: GroupCodec, clip: Clip) -> Tensor:
    """Normalised latents [F, C, h, w] of one clip."""
    pixels, _ = render(clip.frames, preset.height, preset.width)
    return codec.encode(torch.from_numpy(pixels)[None])[0]


def clip_ids(preset: Preset, captions: Sequence[str]) -> list[list[int]]:
    return [padded_ids(caption, preset.dit.text_len) for caption in captions]


def _encode_piece(
    preset: Preset, recipe: Recipe, state: dict[str, Singles], piece: range
) -> tuple[Halves, Bytes]:
    codec = new_codec(preset)
    codec.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
    clips = [clip_of(preset, recipe, index) for index in piece]
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
        latents = torch.stack([encode_clip(preset, codec, clip) for clip in clips])
    ids = np.array([clip_ids(preset, clip.captions) for clip in clips], dtype=np.uint8)
    return latents.half().numpy(), ids
