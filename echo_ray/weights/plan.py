"""What a conversion will write, with everything checked before its first byte.

Files are opened, their keys and shapes compared with the preset; no tensor is computed yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from echo_ray.errors import ConfigError, WeightsError
from echo_ray.model.tokens import PromptTokenizer
from echo_ray.preset import Preset, UMT5Shape, WanVaeShape
from echo_ray.weights.containers import (
    State,
    read_adapter,
    read_generator,
    read_memory,
    read_state,
)
from echo_ray.weights.layout import Shape, expected, problems, shapes_of
from echo_ray.weights.lora import Pair, lora_pairs, merge_into, rank_of
from echo_ray.weights.sources import MERGED, Options, Sources, find_sources
from echo_ray.weights.writer import Entry, in_order, written_dtype

DTYPES: dict[str, torch.dtype | None] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "keep": None,
}
_MEMORY_KEY_NORM = "norm_k_out.weight"


@dataclass(frozen=True, slots=True)
class Origin:
    """A file that goes into a part."""

    part: str
    file: Path
    note: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """One conversion: a safetensors file for each part, the tokenizer, and where all came from."""

    preset: Preset
    parts: dict[str, list[Entry]]
    tokenizer: Path
    origins: list[Origin]
    notes: list[str]


@dataclass(slots=True)
class _Draft:
    """A plan in the making: every problem is kept, to be told in one message."""

    preset: Preset
    wanted: dict[str, dict[str, Shape]]
    dtype: torch.dtype | None
    parts: dict[str, list[Entry]] = field(default_factory=dict)
    origins: list[Origin] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(
        self,
        part: str,
        state: Mapping[str, torch.Tensor],
        pairs: Mapping[str, Pair] | None = None,
    ) -> None:
        """Plan a part's file, or note why its tensors do not fit."""
        found = problems(self.preset, part, self.wanted[part], shapes_of(state))
        self.problems += found
        if found:
            return
        entries = []
        for key, value in state.items():
            pair = (pairs or {}).get(key)
            make = merge_into(value, pair) if pair is not None else lambda value=value: value
            dtype = written_dtype(value.dtype, self.dtype)
            entries.append(Entry(f"{part}.{key}", dtype, tuple(value.shape), make))
        self.parts[part] = in_order(entries)


def make_plan(
    src: Path, preset: Preset, options: Options | None = None, dtype: str | None = None
) -> Plan:
    """Find and open the published files below `src`, and check all of them.

    Raises `WeightsError` with every missing, surplus or misshapen tensor of every part.
    """
    require_published(preset)
    name = dtype or preset.dtype
    if name not in DTYPES:
        raise ConfigError(f"--dtype: {name!r} is not allowed: {', '.join(DTYPES)}", param="dtype")
    options = options or Options()
    sources = find_sources(src, preset, options)
    draft = _Draft(preset, expected(preset), DTYPES[name])
    draft.notes += sources.notes
    _plan_transformer(draft, sources, options)
    _plan_file(draft, "text", sources.text)
    _plan_file(draft, "codec", sources.vae)
    if sources.small_codec is not None:
        _plan_file(draft, "small_codec", sources.small_codec)
    _check_tokenizer(draft, sources.tokenizer)
    if draft.problems:
        lines = "".join(f"\n  {problem}" for problem in draft.problems)
        raise WeightsError(f"{src}: these files are not {preset.name}:{lines}")
    return Plan(preset, draft.parts, sources.tokenizer, draft.origins, draft.notes)


def require_published(preset: Preset) -> None:
    """Raise `ConfigError` for a preset whose weights were never published in other containers."""
    if not isinstance(preset.text, UMT5Shape) or not isinstance(preset.codec, WanVaeShape):
        raise ConfigError(
            f"preset {preset.name}: is not made of published checkpoints (umT5 and the Wan VAE); "
            "choose one that is with --preset, such as echo-infinity-1.3b",
            param="preset",
        )


def _plan_file(draft: _Draft, part: str, file: Path) -> None:
    try:
        draft.add(part, read_state(file))
    except WeightsError as e:
        draft.problems.append(f"{part}: {e.message}")
    draft.origins.append(Origin(part, file))


def _plan_transformer(draft: _Draft, sources: Sources, options: Options) -> None:
    """The generator with its adapter, and the memory encoder from wherever it is."""
    dit: State | None = None
    memory: State = {}
    lora_memory: State = {}
    pairs: dict[str, Pair] = {}
    try:
        generator = read_generator(sources.generator, ema=options.ema)
        dit, memory = generator.dit, generator.memory
        notes = [*generator.notes, *([MERGED] if sources.taken_as_merged else [])]
        draft.origins.append(Origin("dit", sources.generator, ", ".join(notes)))
    except WeightsError as e:
        draft.problems.append(f"dit: {e.message}")
    if sources.lora is not None:
        try:
            adapter = read_adapter(sources.lora)
            lora_memory = adapter.memory
            what = str(sources.lora)
            pairs = lora_pairs(draft.wanted["dit"], adapter.lora, options.lora_alpha, what)
            alpha = options.lora_alpha or rank_of(pairs)
            note = f"LoRA of rank {rank_of(pairs)}, alpha {alpha:g}, merged"
            draft.notes.append(f"{sources.lora.name}: {note}")
            draft.origins.append(Origin("dit", sources.lora, note))
        except WeightsError as e:
            draft.problems.append(f"dit: {e.message}")
    if dit is not None:
        draft.add("dit", dit, pairs)
    _plan_memory(draft, sources, memory, lora_memory)


def _plan_memory(draft: _Draft, sources: Sources, inside: State, of_lora: State) -> None:
    """A file named for it first, then the adapter's, then the generator's."""
    shape = draft.preset.cache.memory
    if shape is None:
        if inside or of_lora or sources.memory is not None:
            draft.problems.append(
                f"memory: there is a memory encoder, and preset {draft.preset.name} has none"
            )
        return
    state, file = inside, sources.generator
    if of_lora and sources.lora is not None:
        state, file = of_lora, sources.lora
    if sources.memory is not None:
        file = sources.memory
        try:
            state = read_memory(file)
        except WeightsError as e:
            draft.problems.append(f"memory: {e.message}")
            return
    if not state:
        draft.problems.append(
            "memory: no memory encoder: none inside the generator (query_memory_encoder.*), none "
            "beside it, none with an adapter; random ones are never used: name its file with "
            "--memory"
        )
        return
    note = ""
    if not shape.normalize_keys and _MEMORY_KEY_NORM in state:
        state = {k: v for k, v in state.items() if k != _MEMORY_KEY_NORM}
        note = f"{_MEMORY_KEY_NORM} left out, as the preset does not normalise memory keys"
        draft.notes.append(f"memory: {note}")
    draft.add("memory", state)
    draft.origins.append(Origin("memory", file, note))


def _check_tokenizer(draft: _Draft, folder: Path) -> None:
    if not isinstance(draft.preset.text, UMT5Shape):
        return
    try:
        PromptTokenizer.from_folder(folder, draft.preset.dit.text_len, draft.preset.text.vocab)
    except (ConfigError, WeightsError) as e:
        draft.problems.append(f"text: {e.message}")
    draft.origins.append(Origin("text", folder / "tokenizer.json"))
