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
from echo_ray.training.recipe import ClipsSection
from echo_ray.training.trainable import new_codec

Singles = NDArray[np.float32]
Halves = NDArray[np.float16]
Bytes = NDArray[np.uint8]
Piece = tuple[Halves, Bytes, NDArray[np.bool_], Bytes]
"""Latents, word ids, hidden chunks and object counts of some clips."""


@dataclass(frozen=True)
class Bank:
    """Every training clip: latents in half precision and word ids of each chunk's caption."""

    latents_SFChw: Tensor
    ids_SKL: Tensor
    hidden_SK: Tensor
    """Chunks in which nothing but background is to be seen."""
    objects_S: Tensor
    """How many objects a clip has, seen or not."""
    digest: str
    """Of the encoder and the clips that made it."""


@dataclass(frozen=True)
class Batch:
    """Some clips, or a part of them, on the device that trains. Latents are in float32."""

    latents_BFChw: Tensor
    ids_BKL: Tensor
    hidden_BK: Tensor


def take(
    bank: Bank, picked_B: Tensor, chunks: range, frames_per_chunk: int, device: torch.device
) -> Batch:
    """The given chunks of the picked clips."""
    frames = slice(chunks.start * frames_per_chunk, chunks.stop * frames_per_chunk)
    part = slice(chunks.start, chunks.stop)
    return Batch(
        bank.latents_SFChw[picked_B, frames].to(device).float(),
        bank.ids_SKL[picked_B, part].to(device).long(),
        bank.hidden_SK[picked_B, part].to(device),
    )


def clip_of(preset: Preset, section: ClipsSection, index: int) -> Clip:
    """Training clip `index`: a function of the seed and the index alone."""
    rng = np.random.default_rng([section.seed, 1, index])
    size = min(preset.height, preset.width)
    return make_clip(rng, section.chunks, size, preset.first_chunk_frames, preset.frames_per_chunk)


def bank_digest(codec: GroupCodec, section: ClipsSection) -> str:
    """Names the encoder's weights and the clips; another value means another bank."""
    total = hashlib.sha256(f"{section.seed} {section.count} {section.chunks}".encode())
    for name, value in sorted(codec.state_dict().items()):
        if not name.startswith("decoder."):
            total.update(name.encode() + value.float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def load_or_build(
    preset: Preset, section: ClipsSection, codec: GroupCodec, folder: Path, *, bf16: bool
) -> Bank:
    """Read the folder's bank of this encoder and these clips; else build and write it."""
    digest = bank_digest(codec, section)
    file = folder / f"bank-{digest}.pt"
    if file.exists():
        return Bank(**torch.load(file, weights_only=True, mmap=True))
    bank = build(preset, section, codec, digest, bf16=bf16)
    folder.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    torch.save(dict(vars(bank)), part)
    part.replace(file)
    return bank


def build(
    preset: Preset, section: ClipsSection, codec: GroupCodec, digest: str, *, bf16: bool
) -> Bank:
    """Render and encode every clip, in as many processes as `workers` if more than one."""
    pieces = [range(i, min(i + 20, section.count)) for i in range(0, section.count, 20)]
    state = {k: v.cpu().numpy() for k, v in codec.state_dict().items()}
    encode = partial(_encode_piece, preset, section, state, bf16)
    columns: list[list[Tensor]] = [[], [], [], []]
    with ExitStack() as stack:
        made: Iterable[Piece] = map(encode, pieces)
        if section.workers > 1:
            context, threads = get_context("spawn"), torch.set_num_threads
            pool = ProcessPoolExecutor(section.workers, context, threads, (1,))
            made = stack.enter_context(pool).map(encode, pieces)
        for piece in tqdm(made, "bank", len(pieces), mininterval=5.0):
            for column, values in zip(columns, piece, strict=True):
                column.append(torch.from_numpy(values))
    latents, ids, hidden, objects = (torch.cat(column) for column in columns)
    return Bank(latents, ids, hidden, objects, digest)


@torch.no_grad()
def encode_clip(preset: Preset, codec: GroupCodec, clip: Clip) -> Tensor:
    """Normalised latents [F, C, h, w] of one clip."""
    pixels, _ = render(clip.frames, preset.height, preset.width)
    return codec.encode(torch.from_numpy(pixels)[None])[0]


def clip_ids(preset: Preset, captions: Sequence[str]) -> list[list[int]]:
    return [padded_ids(caption, preset.dit.text_len) for caption in captions]


def _encode_piece(
    preset: Preset, section: ClipsSection, state: dict[str, Singles], bf16: bool, piece: range
) -> Piece:
    codec = new_codec(preset)
    codec.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
    clips = [clip_of(preset, section, index) for index in piece]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        latents = torch.stack([encode_clip(preset, codec, clip) for clip in clips])
    ids = np.array([clip_ids(preset, clip.captions) for clip in clips], dtype=np.uint8)
    hidden = np.array([~clip.script.visible_KO.any(axis=1) for clip in clips])
    objects = np.array([clip.script.visible_KO.shape[1] for clip in clips], dtype=np.uint8)
    return latents.half().numpy(), ids, hidden, objects
