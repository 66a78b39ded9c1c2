"""Chunks as things to look at on disk: one MP4 clip, one contact sheet."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from echo_ray.engine.frames import add_h264, pixels, yuv_frame
from echo_ray.errors import InvalidRequestError
from echo_ray.session.chunk import Chunk

MIN_SIDE = 256
"""Smaller pictures are enlarged by whole pixels to at least this, so that they stay crisp."""

_TILE_SIDE = 128
_LABEL_ROWS = 14
_GAP = 4
_PAPER = (24, 24, 27)
_INK = (228, 228, 231)
_CLIP = {"preset": "medium", "crf": "16", "x264-params": "threads=1"}


def write_clip(path: Path, chunks: Iterable[Chunk], fps: int) -> int:
    """Write the chunks, one after the other, as one MP4 file; returns the number of frames.

    Takes chunks as they come and keeps none. Raises `InvalidRequestError` when the file cannot be
    written, or there is nothing to write.
    """
    feed = iter(chunks)
    first = next(feed, None)
    if first is None:
        raise InvalidRequestError(f"{path}: no chunk to write; generate at least one")
    try:
        with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
            factor = _factor(first, MIN_SIDE)
            size = (first.width * factor, first.height * factor)
            stream = add_h264(container, *size, fps, _CLIP)
            written = 0
            for chunk in _same_size(first, feed):
                for frame in pixels(chunk):
                    container.mux(stream.encode(yuv_frame(_enlarged(frame, factor), written, fps)))
                    written += 1
            container.mux(stream.encode(None))
    except OSError as e:
        raise InvalidRequestError(
            f"{path}: cannot be written: {e.strerror or e}; name a file in a folder that exists"
        ) from e
    return written


def contact_sheet(chunks: Sequence[Chunk], columns: int) -> bytes:
    """A PNG of every chunk's middle frame, labelled with its index, `columns` in a row.

    An asterisk beside the index marks a chunk under another prompt than the one before it.
    """
    if not chunks or columns < 1:
        raise InvalidRequestError(
            f"contact sheet of {len(chunks)} chunks in {columns} columns; both must be at least 1"
        )
    first = chunks[0]
    factor = _factor(first, _TILE_SIDE)
    width = first.width * factor + _GAP
    height = first.height * factor + _LABEL_ROWS + _GAP
    rows = -(-len(chunks) // columns)
    size = (min(columns, len(chunks)) * width + _GAP, rows * height + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    before = first.prompt
    for place, chunk in enumerate(_same_size(first, iter(chunks[1:]))):
        x, y = _GAP + place % columns * width, _GAP + place // columns * height
        middle = pixels(chunk)[chunk.num_frames // 2]
        sheet.paste(Image.fromarray(_enlarged(middle, factor)), (x, y + _LABEL_ROWS))
        draw.text((x, y), f"{chunk.index}{' *' if chunk.prompt != before else ''}", fill=_INK)
        before = chunk.prompt
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def _same_size(first: Chunk, rest: Iterable[Chunk]) -> Iterable[Chunk]:
    yield first
    for chunk in rest:
        if (chunk.width, chunk.height) != (first.width, first.height):
            raise InvalidRequestError(
                f"chunk {chunk.index} is {chunk.width} x {chunk.height}, chunk {first.index} is "
                f"{first.width} x {first.height}; a clip has one size"
            )
        yield chunk


def _factor(chunk: Chunk, side: int) -> int:
    """How many times a small picture is enlarged, by whole pixels, to be at least `side` wide."""
    return max(1, -(-side // max(chunk.width, chunk.height)))


def _enlarged(
    frame: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], factor: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return frame if factor == 1 else np.repeat(np.repeat(frame, factor, 0), factor, 1)
