"""`echo-ray snapshot inspect FILE`: what is in a snapshot, and whether it is whole."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echo_ray.session.snapshot import Snapshot

HELP = "look into a snapshot file"
TEXT_SHOWN = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="inspect")
    inspect = verbs.add_parser("inspect", help="header, fingerprint, tensors; checks the digest")
    inspect.add_argument("file", type=Path, help="a file written by echo_ray")


def run(args: argparse.Namespace) -> int:
    """Print the snapshot; anything that is not exactly one is refused."""
    from echo_ray.session.snapshot import decode

    blob = _read(args.file)
    snapshot = decode(blob)
    for line in describe(snapshot, size_bytes=len(blob)):
        print(line)
    return 0


def describe(snapshot: Snapshot, *, size_bytes: int) -> Iterator[str]:
    """The lines of a report on a snapshot whose digest has been checked."""
    yield f"size         {size_bytes} bytes, digest matches"
    yield f"fingerprint  {snapshot.fingerprint}"
    yield "header"
    yield from _entries(snapshot.header, indent=2)
    tensor_bytes = sum(len(t.data) for t in snapshot.tensors.values())
    yield f"tensors      {len(snapshot.tensors)}, {tensor_bytes} bytes"
    width = max((len(name) for name in snapshot.tensors), default=0)
    for name, tensor in sorted(snapshot.tensors.items()):
        shape = " x ".join(str(n) for n in tensor.shape) or "scalar"
        yield f"  {name:<{width}}  {tensor.dtype:<8}  {len(tensor.data):>10} bytes  {shape}"


def _entries(values: Mapping[str, Any], indent: int) -> Iterator[str]:
    for key, value in sorted(values.items()):
        if isinstance(value, Mapping):
            yield f"{'':{indent}}{key}"
            yield from _entries(value, indent + 2)
        else:
            yield f"{'':{indent}}{key}: {_short(value)}"


def _short(value: object) -> str:
    text = f"{len(value)} bytes" if isinstance(value, bytes) else repr(value)
    return text if len(text) <= TEXT_SHOWN else f"{text[: TEXT_SHOWN - 1]}…"


def _read(file: Path) -> bytes:
    from echo_ray.errors import SnapshotError

    try:
        return file.read_bytes()
    except OSError as e:
        raise SnapshotError(f"{file}: cannot be read: {e.strerror or e}; name a file") from e
