"""A weights folder opened for reading: checked against its manifest, read part by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from echo_ray.errors import ConfigError, WeightsError
from echo_ray.preset import Preset, check_memory_tokens
from echo_ray.weights.manifest import Manifest, file_record, read_manifest
from echo_ray.weights.wording import listed


@dataclass(frozen=True, slots=True)
class WeightsFolder:
    """Weights of one model on a disk; holds no tensor itself."""

    path: Path
    manifest: Manifest
    index: Mapping[str, Mapping[str, str]]
    """Part, then key without the part, then the file that holds it."""
    _checked: set[str] = field(default_factory=set, compare=False, repr=False)

    @classmethod
    def open(cls, path: Path) -> WeightsFolder:
        """Read the manifest and the files' tables of contents; no tensor is read yet.

        Raises `WeightsError` for a folder without manifest, for files that are missing or of
        another size than the manifest says, and for a tokenizer that has changed.
        """
        path = Path(path)
        manifest = read_manifest(path)
        _check_sizes(path, manifest)
        index: dict[str, dict[str, str]] = {}
        for name in sorted(n for n in manifest.files if n.endswith(".safetensors")):
            for part, key in _contents(path / name):
                if key in index.setdefault(part, {}):
                    raise WeightsError(f"{path}: {part}.{key} is in {index[part][key]} and {name}")
                index[part][key] = name
        folder = cls(path, manifest, index)
        for name in manifest.files:
            if not name.endswith(".safetensors"):
                folder.check_file(name)
        return folder

    @property
    def preset(self) -> str:
        """Name of the preset that the weights were converted for."""
        return self.manifest.config.name

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def tokenizer(self) -> Path:
        """Folder of the prompt tokenizer; only umt5 presets have one."""
        return self.path / "tokenizer"

    def has(self, part: str) -> bool:
        return part in self.index

    def keys(self, part: str) -> dict[str, str]:
        """The keys of one part with the file of each. Raises `WeightsError` if it is not here."""
        if part not in self.index:
            held = ", ".join(self.index) or "none"
            raise WeightsError(
                f"{self.path}: no weights of {part} in this folder (it holds {held}); convert "
                "again with the file they come from: echo-ray weights convert SRC DST"
            )
        return dict(self.index[part])

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of a part, from the files' tables of contents."""
        shapes: dict[str, tuple[int, ...]] = {}
        wanted = self.keys(part)
        for name in sorted(set(wanted.values())):
            with safe_open(self.path / name, framework="pt") as f:
                for key in (key for key, file in wanted.items() if file == name):
                    shapes[key] = tuple(f.get_slice(f"{part}.{key}").get_shape())
        return shapes

    def part(
        self,
        part: str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """All tensors of one part, by their key without the part's prefix.

        Each file's hash is checked before the first tensor is taken from it. Tensors stay
        memory-mapped on a CPU if they have the wanted dtype; others are converted one at a time.
        """
        wanted = self.keys(part)
        tensors: dict[str, Tensor] = {}
        for name in sorted(set(wanted.values())):
            self.check_file(name)
            keys = [key for key, file in wanted.items() if file == name]
            for key, value in _read(self.path / name, part, keys):
                tensors[key] = value.to(device=device, dtype=dtype or value.dtype)
        return tensors

    def check_file(self, name: str) -> None:
        """Compare a file with its hash in the manifest, once; raises `WeightsError`."""
        if name in self._checked:
            return
        expected = self.manifest.files[name]
        try:
            found = file_record(self.path / name)
        except OSError as e:
            raise WeightsError(f"{self.path / name}: cannot be read: {e.strerror or e}") from e
        if found != expected:
            raise WeightsError(
                f"{self.path / name}: damaged: {found.bytes} bytes with SHA-256 "
                f"{found.sha256[:16]}…, the manifest says {expected.bytes} and "
                f"{expected.sha256[:16]}…; copy it again, or convert again"
            )
        self._checked.add(name)

    def check(self, preset: Preset) -> None:
        """Raise `WeightsError` unless these weights are of the preset's model.

        What does not touch the weights (sampler, window, dtype, frame rate) may differ.
        """
        stored = self.manifest.config
        differing = sorted(_differences(stored, preset))
        if not differing:
            return
        raise WeightsError(
            f"{self.path}: weights of {self.preset}, not of {preset.name}: {listed(differing)}"
            f"{_resolution(stored, preset)}"
        )


def _check_sizes(path: Path, manifest: Manifest) -> None:
    for name, record in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise WeightsError(
                f"{file}: missing, but the manifest names it; copy the whole folder again"
            )
        size = file.stat().st_size
        if size != record.bytes:
            raise WeightsError(
                f"{file}: {size} bytes, the manifest says {record.bytes}; the file was cut short "
                "or changed: copy it again, or convert again"
            )


def _contents(file: Path) -> Iterator[tuple[str, str]]:
    """Part and key of every tensor of a file."""
    try:
        with safe_open(file, framework="pt") as f:
            names = list(f.keys())
    except (OSError, SafetensorError) as e:
        raise WeightsError(f"{file}: not a safetensors file: {e}; convert again") from e
    for name in names:
        part, _, key = name.partition(".")
        if not key:
            raise WeightsError(f"{file}: tensor {name!r} belongs to no part; convert again")
        yield part, key


def _read(file: Path, part: str, keys: list[str]) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as f:
            for key in keys:
                yield key, f.get_tensor(f"{part}.{key}")
    except (OSError, SafetensorError) as e:
        raise WeightsError(f"{file}: weights cannot be read: {e}; convert again") from e


def _differences(stored: Preset, wanted: Preset) -> Iterator[str]:
    """One line for every value that decides the weights and is not the same in both."""
    pairs: list[tuple[str, Any, Any]] = [
        ("dit", stored.dit, wanted.dit),
        ("text", stored.text, wanted.text),
    ]
    skipped = set() if wanted.cache.memory else {"latent_height", "latent_width"}
    if wanted.cache.memory is not None:
        pairs.append(("cache.memory", stored.cache.memory, wanted.cache.memory))
    # `model.vae: tiny` puts the small codec in the codec's place.
    codecs = {c.kind: c for c in (stored.small_codec, stored.codec) if c is not None}
    pairs.append(("codec", codecs.get(wanted.codec.kind, stored.codec), wanted.codec))
    if wanted.small_codec is not None and stored.small_codec is not None:
        pairs.append(("small_codec", stored.small_codec, wanted.small_codec))
    for at, one, other in pairs:
        mine, theirs = _values(one), _values(other)
        for key in {**mine, **theirs}.keys() - skipped:
            if mine.get(key) != theirs.get(key):
                yield f"{at}.{key} is {mine.get(key)!r} here, {theirs.get(key)!r} there"


def _values(section: Any) -> dict[str, Any]:
    values = {} if section is None else asdict(section)
    # How a switch uses the memory, and a number that follows from others.
    return {k: v for k, v in values.items() if k not in ("recache", "tokens")}


def _resolution(stored: Preset, wanted: Preset) -> str:
    """The sentence on resolution, if the memory's token count is what differs."""
    if stored.cache.memory is None or wanted.cache.memory is None:
        return ""
    tokens = stored.cache.memory.frames * stored.dit.tokens_per_frame
    try:
        check_memory_tokens(wanted.dit, wanted.cache.memory, tokens)
    except ConfigError as e:
        return f". {e.message}"
    return ""
