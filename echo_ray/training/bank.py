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

from echo_ray.model.codec import Codec
from echo_ray.model.words import padded_ids
from echo_ray.preset import Preset, WordTextShape
from echo_ray.scenes.clips import Clip, make_clip
from echo_ray.scenes.scripts import KINDS, TWO_OBJECTS, with_share
from echo_ray.scenes.world import render
from echo_ray.training.recipe import SHORTEST_SCENE, ClipsSection
from echo_ray.weights.parts import build_codec

Singles = NDArray[np.float32]
Halves = NDArray[np.float16]
Bytes = NDArray[np.uint8]
Piece = tuple[Halves, NDArray[np.bool_], Bytes, list[tuple[str, ...]]]
"""Latents, hidden chunks, object counts and captions of some clips."""
SAMPLED = 4
"""Clips that a digest looks at."""


@dataclass(frozen=True)
class Bank:
    """Every training clip: latents in half precision and word ids of each chunk's caption."""

    latents_SFChw: Tensor
    ids_SKL: Tensor
    hidden_SK: Tensor
    """Chunks in which nothing but background is to be seen."""
    objects_S: Tensor
    """How many objects a clip has, seen or not."""
    captions: tuple[str, ...]
    """The captions that a word's id stands for, the empty one first; none if words are read."""
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


def scenes_of(preset: Preset, section: ClipsSection, index: int) -> list[Clip]:
    """Training clip `index`, scene by scene: a function of the section and the index alone."""
    rng = np.random.default_rng([section.seed, 1, index])
    size = min(preset.height, preset.width)
    shares = KINDS if section.hide_share is None else with_share("hide", section.hide_share)
    two_objects = TWO_OBJECTS if section.two_objects is None else section.two_objects
    scenes: list[Clip] = []
    for chunks in scene_lengths(rng, section):
        first = preset.frames_per_chunk if scenes else preset.first_chunk_frames
        later = preset.frames_per_chunk
        scenes.append(
            make_clip(rng, chunks, size, first, later, shares=shares, two_objects=two_objects)
        )
    return scenes


def scene_lengths(rng: np.random.Generator, section: ClipsSection) -> list[int]:
    """How many chunks each scene of a clip has."""
    left, longest, lengths = section.chunks, section.scene_chunks or section.chunks, []
    while left > longest:
        lengths.append(int(rng.integers(SHORTEST_SCENE, min(longest, left - SHORTEST_SCENE) + 1)))
        left -= lengths[-1]
    return [*lengths, left]


def captions_of(scenes: Sequence[Clip]) -> tuple[str, ...]:
    """A caption for each chunk of a clip."""
    return tuple(caption for scene in scenes for caption in scene.captions)


def pixels_of(preset: Preset, scenes: Sequence[Clip]) -> Singles:
    """A clip's frames [T, 3, H, W], 0 to 1."""
    drawn = [render(scene.frames, preset.height, preset.width)[0] for scene in scenes]
    return np.concatenate(drawn)


def bank_digest(preset: Preset, codec: Codec, section: ClipsSection) -> str:
    """Names the encoder's weights and the clips; another value means another bank.

    A few clips stand for the world and its words as they are now.
    """
    asked = f"{section.seed} {section.count} {section.chunks} {section.hide_share}"
    asked += f" {section.scene_chunks}" if section.scene_chunks else ""
    asked += "" if section.two_objects is None else f" two objects {section.two_objects}"
    total = hashlib.sha256(asked.encode())
    for index in range(min(section.count, SAMPLED)):
        scenes = scenes_of(preset, section, index)
        pixels, captions = pixels_of(preset, scenes), captions_of(scenes)
        ids, _ = caption_ids(preset, [captions])
        total.update(pixels.tobytes() + ids.numpy().tobytes() + "|".join(captions).encode())
    for name, value in sorted(codec.state_dict().items()):
        if not name.startswith("decoder."):
            total.update(name.encode() + value.float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def load_or_build(
    preset: Preset, section: ClipsSection, codec: Codec, folder: Path, *, bf16: bool
) -> Bank:
    """Read the folder's bank of this encoder and these clips; else build and write it."""
    digest = bank_digest(preset, codec, section)
    file = folder / f"bank-{digest}.pt"
    if file.exists():
        return Bank(**torch.load(file, weights_only=True, mmap=True))
    bank = build(preset, section, codec, digest, bf16=bf16)
    folder.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    torch.save(dict(vars(bank)), part)
    part.replace(file)
    return bank


def build(preset: Preset, section: ClipsSection, codec: Codec, digest: str, *, bf16: bool) -> Bank:
    """Render and encode every clip, in as many processes as `workers` if more than one."""
    pieces = [range(i, min(i + 20, section.count)) for i in range(0, section.count, 20)]
    state = {k: v.cpu().numpy() for k, v in codec.state_dict().items()}
    encode = partial(_encode_piece, preset, section, state, bf16)
    columns: list[list[Tensor]] = [[], [], []]
    captions: list[Sequence[str]] = []
    with ExitStack() as stack:
        made: Iterable[Piece] = map(encode, pieces)
        if section.workers > 1:
            context, threads = get_context("spawn"), torch.set_num_threads
            pool = ProcessPoolExecutor(section.workers, context, threads, (1,))
            made = stack.enter_context(pool).map(encode, pieces)
        for piece in tqdm(made, "bank", len(pieces), mininterval=5.0):
            for column, values in zip(columns, piece[:3], strict=True):
                column.append(torch.from_numpy(values))
            captions += piece[3]
    latents, hidden, objects = (torch.cat(column) for column in columns)
    ids, table = caption_ids(preset, captions)
    return Bank(latents, ids, hidden, objects, table, digest)


@torch.no_grad()
def encode_clip(preset: Preset, codec: Codec, scenes: Sequence[Clip]) -> Tensor:
    """Normalised latents [F, C, h, w] of one clip."""
    return codec.encode(torch.from_numpy(pixels_of(preset, scenes))[None])[0]


def caption_ids(
    preset: Preset, captions: Sequence[Sequence[str]]
) -> tuple[Tensor, tuple[str, ...]]:
    """Word ids [S, K, L] of all captions; without words, places in the table that comes along."""
    table = ("", *sorted({caption for clip in captions for caption in clip} - {""}))
    place = {caption: n for n, caption in enumerate(table)}
    places_SK = torch.tensor([[place[caption] for caption in clip] for clip in captions])
    if not isinstance(preset.text, WordTextShape):
        return places_SK[:, :, None].to(torch.int32), table
    words = torch.tensor([padded_ids(caption, preset.dit.text_len) for caption in table])
    return words.to(torch.uint8)[places_SK], ()


def _encode_piece(
    preset: Preset, section: ClipsSection, state: dict[str, Singles], bf16: bool, piece: range
) -> Piece:
    codec = build_codec(preset.codec, preset.dit)
    codec.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
    clips = [scenes_of(preset, section, index) for index in piece]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        latents = torch.stack([encode_clip(preset, codec, clip) for clip in clips])
    scripts = [[scene.script for scene in scenes] for scenes in clips]
    hidden = np.array([np.concatenate([s.hidden_K for s in clip]) for clip in scripts])
    objects = [max(s.colour_KO.shape[1] for s in clip) for clip in scripts]
    counts = np.array(objects, dtype=np.uint8)
    return latents.half().numpy(), hidden, counts, [captions_of(scenes) for scenes in clips]
