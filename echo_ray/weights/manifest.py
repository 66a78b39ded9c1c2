"""`manifest.json` of a weights folder: which model, which files with which hashes, from where.

Knows files and their hashes; never opens a tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from tqdm import tqdm

from echo_ray.config import from_mapping
from echo_ray.errors import ConfigError, WeightsError
from echo_ray.preset import Preset

FILE = "manifest.json"
FORMAT = "echo-ray/weights"
VERSION = 1
SHOWN_FROM_BYTES = 256 * 2**20
"""Reading a file at least this large shows its progress."""
_BLOCK_BYTES = 8 * 2**20
_REMEDY = "echo-ray weights convert SRC DST"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Source:
    """A published file that went into a part of the weights."""

    part: str
    file: str
    bytes: int
    sha256: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `manifest.json` says; `config` is the preset that the weights were made for."""

    config: Preset
    files: Mapping[str, FileRecord]
    sources: tuple[Source, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 over the names and hashes of all files: the identity of these weights."""
        whole = hashlib.sha256()
        for name, record in sorted(self.files.items()):
            whole.update(f"{name}\0{record.sha256}\n".encode())
        return whole.hexdigest()


def file_record(file: Path, read: Callable[[int], object] | None = None) -> FileRecord:
    """Read a whole file for its size and hash, telling `read` how many bytes have been read.

    Without it, a large file shows its progress. Raises `OSError` as `open` does.
    """
    size, whole = file.stat().st_size, hashlib.sha256()
    hidden = True if read is not None or size < SHOWN_FROM_BYTES else None
    with file.open("rb") as f, progress(size, f"checking {file.name}", disable=hidden) as bar:
        while block := f.read(_BLOCK_BYTES):
            whole.update(block)
            (read or bar.update)(len(block))
    return FileRecord(size, whole.hexdigest())


def progress(size_bytes: int, what: str, *, disable: bool | None = None) -> tqdm[NoReturn]:
    """A bar over bytes with the time that is left; only on a terminal."""
    return tqdm(
        total=size_bytes, desc=what, unit="B", unit_scale=True, unit_divisor=1000, disable=disable
    )


def write_manifest(
    folder: Path,
    preset: Preset,
    files: Iterable[str] | Mapping[str, FileRecord],
    sources: Sequence[Source] = (),
) -> Manifest:
    """Write `manifest.json` beside the files it names, which makes the folder a weights folder.

    Files given by name alone are read for their hashes.
    """
    records = (
        dict(files)
        if isinstance(files, Mapping)
        else {name: file_record(folder / name) for name in files}
    )
    manifest = Manifest(preset, records, tuple(sources))
    text = json.dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "preset": preset.name,
            "config": asdict(preset),
            "files": {name: asdict(record) for name, record in sorted(records.items())},
            "sources": [asdict(source) for source in manifest.sources],
        },
        indent=1,
    )
    part = folder / f"{FILE}.part"
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(folder / FILE)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises `WeightsError` where there is none, or one that is damaged or newer than this release.
    """
    file = folder / FILE
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise WeightsError(
            f"{folder}: not a weights folder: it has no {FILE}; make one from published "
            f"checkpoints with: {_REMEDY}"
        ) from None
    except OSError as e:
        raise WeightsError(f"{file}: cannot be read: {e.strerror or e}") from e
    except ValueError as e:
        raise WeightsError(f"{file}: not JSON: {e}; convert again: {_REMEDY}") from e
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise WeightsError(f"{file}: format is not {FORMAT!r}; convert again: {_REMEDY}")
    if data.get("version") != VERSION:
        raise WeightsError(
            f"{file}: version {data.get('version')!r} is not {VERSION}, the only one that this "
            f"release reads; install the release that wrote it, or convert again: {_REMEDY}"
        )
    return _parsed(file, lambda: _manifest(data))


def _parsed(file: Path, parse: Callable[[], Manifest]) -> Manifest:
    try:
        return parse()
    except ConfigError as e:
        raise WeightsError(f"{file}: {e.message}; convert again: {_REMEDY}") from e
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise WeightsError(
            f"{file}: damaged ({type(e).__name__}: {e}); convert again: {_REMEDY}"
        ) from e


def _manifest(data: Mapping[str, Any]) -> Manifest:
    config = from_mapping(Preset, data["config"], "config")
    files = {_inside(name): _record(value) for name, value in data["files"].items()}
    return Manifest(config, files, tuple(Source(**source) for source in data["sources"]))


def _record(value: Mapping[str, Any]) -> FileRecord:
    record = FileRecord(**value)
    if not isinstance(record.bytes, int) or not isinstance(record.sha256, str):
        raise TypeError(f"{value!r} is not a size and a hash")
    return record


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"file {name!r} lies outside the folder")
    return name
