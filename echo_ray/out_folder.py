"""The folder that a command writes its findings to."""

from __future__ import annotations

from pathlib import Path

from echo_ray.errors import InvalidRequestError


def claim(out: Path) -> None:
    """Make the folder, and see that it takes files, before anything is measured.

    Raises `InvalidRequestError`.
    """
    probe = out / ".probe"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as e:
        raise unwritable(out, e) from e


def unwritable(out: Path, error: OSError) -> InvalidRequestError:
    """What to raise where a file could not be written there."""
    return InvalidRequestError(
        f"--out {out}: cannot be written: {error.strerror or error}; name a folder of your own",
        param="out",
    )
