"""How messages about weights list names and sizes."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 8


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


def counted(kinds: dict[str, list[str]]) -> list[str]:
    """`N missing: a, b` for every kind of problem that there is."""
    return [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names]


def in_units(size_bytes: int) -> str:
    """A size that a person can compare with a disk's."""
    if size_bytes < 10**6:
        return f"{size_bytes} bytes"
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes < 10**9 else f"{size_bytes / 1e9:.1f} GB"
