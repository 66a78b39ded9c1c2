"""Published checkpoint files: read without running anything in them, their keys made plain.

Tensors come memory-mapped, so that a file larger than the memory can be opened.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from echo_ray.errors import WeightsError

WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
"""Left in keys by training frameworks, anywhere between two dots."""
LEADING = frozenset({"model", "module"})
MEMORY = "query_memory_encoder"
_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
# How torch.save began its files before they were zip archives: its magic number, as a pickle.
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_REFUSED = re.compile(r"Unsupported (?:global|class|operand).*?([\w.]*\w)[\s'\"]", re.DOTALL)
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")

State = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Generator:
    """What a generator checkpoint holds for us."""

    dit: State
    memory: State
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Adapter:
    """What a LoRA checkpoint holds for us; `lora` under its own keys."""

    lora: State
    memory: State


def read_container(file: Path) -> dict[str, Any]:
    """Open a checkpoint; only tensors and plain values can come out of it.

    Raises `WeightsError` for anything that is not a whole checkpoint, or that would have to run
    code to be read.
    """
    if file.is_dir():
        raise WeightsError(f"{file}: is a folder; name the checkpoint file in it")
    try:
        with file.open("rb") as f:
            magic = f.read(len(_LEGACY))
    except OSError as e:
        raise WeightsError(f"{file}: cannot be read: {e.strerror or e}") from e
    if not magic:
        raise WeightsError(f"{file}: is empty; download it again")
    data = _safetensors(file) if file.suffix == ".safetensors" else _torch(file, magic)
    if not isinstance(data, dict):
        raise WeightsError(f"{file}: holds a {type(data).__name__}, not a dict of tensors")
    return data


def _safetensors(file: Path) -> State:
    try:
        with safe_open(file, framework="pt") as f:
            return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise WeightsError(
            f"{file}: truncated, or not a safetensors file: {e}; download it again"
        ) from e


def _torch(file: Path, magic: bytes) -> Any:
    is_zip = magic.startswith(_ZIP)
    if not is_zip and magic != _LEGACY:
        what = "is a bare pickle" if magic[:1] == _PICKLE else "begins like none"
        raise WeightsError(
            f"{file}: {what}, not a PyTorch checkpoint; refused, and nothing in it was executed"
        )
    try:
        with warnings.catch_warnings():
            # The reader remarks on oddities of files that it goes on to refuse.
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", mmap=is_zip, weights_only=True)
    except pickle.UnpicklingError as e:
        raise WeightsError(_refusal(file, str(e))) from e
    except Exception as e:  # the reader fails as the damage has it, in no tree of its own
        raise WeightsError(
            f"{file}: truncated or damaged ({_first_line(e)}); download it again"
        ) from e


def _refusal(file: Path, said: str) -> str:
    named = _GLOBAL.search(said) or _REFUSED.search(said)
    if named is None:
        return f"{file}: truncated or damaged ({said.splitlines()[-1][:200]}); download it again"
    return (
        f"{file}: holds more than tensors: it asks for {named.group(1)}; refused, and nothing in "
        "it was executed. Save the tensors alone: torch.save of a dict, or safetensors"
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def plain_key(key: str) -> str:
    """A key without wrapper names anywhere and without `model.` or `module.` in front."""
    names = [name for name in key.split(".") if name not in WRAPPERS]
    while len(names) > 1 and names[0] in LEADING:
        del names[0]
    return ".".join(names)


def plain_state(tensors: Mapping[str, Any], file: Path) -> State:
    """All tensors under their plain keys.

    Raises `WeightsError` for a value that is not a tensor, and for two different tensors whose
    keys become the same.
    """
    state: State = {}
    origin: dict[str, str] = {}
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise WeightsError(f"{file}: {key!r} is a {type(value).__name__}, not a tensor")
        plain = plain_key(key)
        if plain in state and not _same(state[plain], value):
            raise WeightsError(
                f"{file}: {origin[plain]!r} and {key!r} are both {plain!r}, with different values"
            )
        if plain not in state:
            state[plain], origin[plain] = value, key
    return state


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def read_state(file: Path) -> State:
    """A file of bare keys, or with them under `model` or `state_dict`."""
    data = read_container(file)
    for name in ("model", "state_dict"):
        if isinstance(data.get(name), Mapping):
            return plain_state(data[name], file)
    return plain_state(data, file)


def read_memory(file: Path) -> State:
    """A memory encoder in a file of its own, with or without its name before the keys."""
    data = read_container(file)
    inner = data.get(MEMORY)
    if isinstance(inner, Mapping):
        return _memory_keys(plain_state(inner, file))
    return _memory_keys(plain_state(data, file))


def _memory_keys(state: State) -> State:
    return {key.removeprefix(f"{MEMORY}."): value for key, value in state.items()}


def read_generator(file: Path, *, ema: bool = False) -> Generator:
    """The transformer of a generator checkpoint, and the memory encoder if one is in it.

    Averaged weights (`ema`) know no memory encoder: it always comes from `generator`.
    """
    data = read_container(file)
    states = {
        name: plain_state(data[name], file)
        for name in ("generator", "generator_ema", "model")
        if isinstance(data.get(name), Mapping)
    }
    notes: list[str] = []
    if "generator" in states or "generator_ema" in states:
        chosen = _chosen(states, notes, ema=ema)
        trained = states.get("generator", {})
    elif "model" in states:
        chosen = trained = states["model"]
    else:
        _refuse_other(data, file)
        chosen = trained = plain_state(data, file)
    prefix = f"{MEMORY}."
    dit = {k: v for k, v in chosen.items() if not k.startswith(prefix)}
    memory = {k: v for k, v in chosen.items() if k.startswith(prefix)}
    memory |= {k: v for k, v in trained.items() if k.startswith(prefix)}
    return Generator(dit, _beside(data, file, _memory_keys(memory), notes), notes)


def _chosen(states: Mapping[str, State], notes: list[str], *, ema: bool) -> State:
    order = ("generator_ema", "generator") if ema else ("generator", "generator_ema")
    name = next(n for n in order if n in states)
    notes.append(name if name == order[0] else f"{name}, as there is no {order[0]}")
    return states[name]


def _refuse_other(data: Mapping[str, Any], file: Path) -> None:
    if "generator_lora" in data or any("lora_" in str(key) for key in data):
        raise WeightsError(f"{file}: is a LoRA, not a generator; give it with --lora")
    if not any(isinstance(value, Tensor) for value in data.values()):
        held = ", ".join(repr(k) for k in list(data)[:8]) or "nothing"
        raise WeightsError(
            f"{file}: not a generator checkpoint: it holds {held}, neither 'generator', "
            "'generator_ema' and 'model' nor tensors"
        )


def _beside(data: Mapping[str, Any], file: Path, inside: State, notes: list[str]) -> State:
    """The memory encoder of a generator file that may keep it as a dict of its own."""
    if not isinstance(data.get(MEMORY), Mapping):
        return inside
    beside = _memory_keys(plain_state(data[MEMORY], file))
    differs = inside.keys() != beside.keys() or any(
        not _same(inside[key], beside[key]) for key in beside
    )
    if inside and differs:
        raise WeightsError(
            f"{file}: holds two different memory encoders, one under {MEMORY!r} and one inside "
            "the generator; name the file of the right one with --memory"
        )
    notes.append(f"{MEMORY} beside the generator")
    return beside


def read_adapter(file: Path) -> Adapter:
    """The LoRA of an adapter checkpoint, and the memory encoder stored beside it if there is."""
    data = read_container(file)
    inner, beside = data.get("generator_lora"), data.get(MEMORY)
    lora = inner if isinstance(inner, Mapping) else {k: v for k, v in data.items() if k != MEMORY}
    if not any("lora_" in str(key) for key in lora):
        held = ", ".join(repr(k) for k in list(data)[:8]) or "nothing"
        raise WeightsError(f"{file}: not a LoRA: it holds {held}, and no lora_A or lora_B")
    memory = _memory_keys(plain_state(beside, file)) if isinstance(beside, Mapping) else {}
    return Adapter(plain_state(lora, file), memory)
