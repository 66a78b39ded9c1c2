"""Boxes of an MP4 file: finding them, and putting a fragment in its place in the stream."""

from __future__ import annotations

from collections.abc import Iterator

from echo_ray.errors import EngineError

_SEGMENT_BOXES = (b"ftyp", b"moov", b"moof", b"mdat")


def boxes(
    data: bytes | bytearray, start: int = 0, stop: int | None = None
) -> Iterator[tuple[bytes, int, int]]:
    """Boxes between two offsets, in order: type, offset of the header, offset of the end."""
    at, stop = start, len(data) if stop is None else stop
    while at < stop:
        size = int.from_bytes(data[at : at + 4], "big")
        if at + 8 > stop or size < 8 or at + size > stop:
            raise EngineError(
                f"MP4 box at byte {at} has size {size} but {stop - at} bytes are left"
            )
        yield bytes(data[at + 4 : at + 8]), at, at + size
        at += size


def find_box(data: bytes | bytearray, *path: bytes) -> tuple[int, int]:
    """Offsets of the first box at `path`: of its header and of its end."""
    start, stop = 0, len(data)
    header = 0
    for kind in path:
        found = next((b for b in boxes(data, start, stop) if b[0] == kind), None)
        if found is None:
            names = "/".join(p.decode() for p in path)
            raise EngineError(f"MP4 of {len(data)} bytes has no box {names}")
        _, header, stop = found
        start = header + 8
    return header, stop


def place_fragment(data: bytes, *, decode_time: int, sequence: int) -> bytes:
    """A fragmented file of one fragment, as a segment that begins at `decode_time`.

    Anything but the header and the fragment (an index at the end, say) is dropped. Offsets inside a
    fragment count from the fragment itself, so nothing else moves.
    """
    kept = [data[at:end] for kind, at, end in boxes(data) if kind in _SEGMENT_BOXES]
    kinds = tuple(piece[4:8] for piece in kept)
    if kinds != _SEGMENT_BOXES:
        found = ", ".join(k.decode("latin-1") for k in kinds)
        raise EngineError(f"fragment needs ftyp, moov, moof, mdat once and in order, not: {found}")
    segment = bytearray(b"".join(kept))
    at, _ = find_box(segment, b"moof", b"mfhd")
    segment[at + 12 : at + 16] = (sequence % 2**32).to_bytes(4, "big")
    at, _ = find_box(segment, b"moof", b"traf", b"tfdt")
    if segment[at + 8] != 1:
        raise EngineError("fragment has a 32-bit decode time; 64 bits are needed")
    segment[at + 12 : at + 20] = decode_time.to_bytes(8, "big")
    return bytes(segment)
