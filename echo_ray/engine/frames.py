"""A chunk's frames as the bytes that viewers get: raw, motion JPEG or a fragment of MP4.

Every segment can be decoded alone. An fmp4 segment is a whole file (ftyp, moov, one moof, mdat)
whose decode time is its place in the stream, so segments can also be appended one after the other
to one MSE SourceBuffer, or written one after the other to one file. Knows nothing about sessions.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from echo_ray.engine.boxes import place_fragment
from echo_ray.errors import EngineError, InvalidRequestError
from echo_ray.session.chunk import Chunk

FORMATS = ("raw", "jpeg", "fmp4")

TICKS_PER_FRAME = 1000
JPEG_QUALITY = 90

# One profile and level for every size, so that a player can be told the codec before the first
# segment exists. Level 4.0 holds 1920 x 1088 at 30 frames a second.
_CODECS = "avc1.640028"
_MIMES = {
    "raw": "application/octet-stream",
    "jpeg": "video/x-mjpeg",
    "fmp4": f'video/mp4; codecs="{_CODECS}"',
}
_X264 = {
    "preset": "veryfast",
    "tune": "zerolatency",
    "profile": "high",
    "level": "4.0",
    "crf": "18",
    # One IDR per chunk and nothing that looks back past it.
    "x264-params": "keyint=infinite:scenecut=0:bframes=0:open-gop=0:threads=1:sliced-threads=0",
}
_MOV = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}


def mime(fmt: str) -> str:
    """The media type of a format's segments, codecs included, the same for every picture size."""
    return _MIMES[check_format(fmt)]


def check_format(fmt: str) -> str:
    """Return `fmt` if it is a format, else raise `InvalidRequestError` naming those that exist."""
    if fmt not in FORMATS:
        raise InvalidRequestError(
            f"format {fmt!r} is unknown; known: {', '.join(FORMATS)}", param="format"
        )
    return fmt


def encode(chunk: Chunk, fmt: str, *, fps: int, start_frame: int) -> bytes:
    """The segment of `chunk`; equal chunks give equal bytes.

    raw: the frames as they are. jpeg: one JPEG per frame, one right after the other (`split_jpegs`
    takes them apart). fmp4: one closed H.264 group of pictures at `start_frame` in the stream.
    """
    encoder = _ENCODERS[check_format(fmt)]
    if fps < 1:
        raise InvalidRequestError(f"fps {fps} is not a frame rate; at least 1", param="fps")
    if start_frame < 0:
        raise InvalidRequestError(
            f"start_frame {start_frame} lies before the stream; at least 0", param="start_frame"
        )
    return encoder(chunk, fps, start_frame)


def pixels(chunk: Chunk) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The frames as an array [frame, row, column, RGB], without a copy."""
    expected = chunk.num_frames * chunk.height * chunk.width * 3
    if chunk.num_frames < 1 or len(chunk.frames) != expected:
        raise EngineError(
            f"chunk {chunk.index} has {len(chunk.frames)} bytes for {chunk.num_frames} frames of "
            f"{chunk.width} x {chunk.height}, not {expected}"
        )
    shape = (chunk.num_frames, chunk.height, chunk.width, 3)
    return np.frombuffer(chunk.frames, dtype=np.uint8).reshape(shape)


def split_jpegs(segment: bytes) -> list[bytes]:
    """The single frames of a jpeg segment, each a whole JPEG file.

    Headers are skipped by their lengths, since an end marker inside one is data.
    """
    frames = []
    start = 0
    while start < len(segment):
        end = _jpeg_end(segment, start)
        frames.append(segment[start:end])
        start = end
    return frames


def _raw(chunk: Chunk, fps: int, start_frame: int) -> bytes:
    pixels(chunk)
    return chunk.frames


def _jpeg(chunk: Chunk, fps: int, start_frame: int) -> bytes:
    out = io.BytesIO()
    for frame in pixels(chunk):
        # 4:4:4, since halved colour is plain to see in pictures of 64 pixels.
        Image.fromarray(frame).save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return out.getvalue()


def _fmp4(chunk: Chunk, fps: int, start_frame: int) -> bytes:
    out = io.BytesIO()
    timescale = fps * TICKS_PER_FRAME
    options = {**_MOV, "video_track_timescale": str(timescale)}
    with av.open(out, "w", format="mp4", options=options) as container:
        stream = add_h264(container, chunk.width, chunk.height, fps, _X264)
        for number, frame in enumerate(pixels(chunk)):
            container.mux(stream.encode(yuv_frame(frame, number, fps)))
        container.mux(stream.encode(None))
    return place_fragment(
        out.getvalue(), decode_time=start_frame * TICKS_PER_FRAME, sequence=start_frame + 1
    )


def add_h264(
    container: av.container.OutputContainer,
    width: int,
    height: int,
    fps: int,
    options: dict[str, str],
) -> av.VideoStream:
    """Add an H.264 stream with BT.709 colour, encoded on the calling thread."""
    if width % 2 or height % 2:
        raise InvalidRequestError(
            f"H.264 needs an even width and height, not {width} x {height}; take jpeg or raw",
            param="format",
        )
    stream = container.add_stream("libx264", rate=fps, options=options)
    context = stream.codec_context
    context.width, context.height = width, height
    context.pix_fmt = "yuv420p"
    context.time_base = Fraction(1, fps)
    context.thread_count = 1
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    context.colorspace = Colorspace.ITU709
    context.color_range = ColorRange.MPEG
    return stream


def yuv_frame(
    frame: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], number: int, fps: int
) -> av.VideoFrame:
    """One picture as BT.709 studio-range YUV, shown `number` frames after the start."""
    picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        dst_color_trc=ColorTrc.BT709,
        dst_color_primaries=ColorPrimaries.BT709,
    )
    picture.time_base = Fraction(1, fps)
    picture.pts = number
    picture.duration = 1
    return picture


def _jpeg_end(data: bytes, start: int) -> int:
    """Where the JPEG that begins at `start` ends."""
    if data[start : start + 2] != b"\xff\xd8":
        raise _not_jpegs(start)
    at = start + 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:
            # Entropy-coded data escapes every 0xFF, so the next end marker is the real one.
            end = data.find(b"\xff\xd9", at)
            if end < 0:
                break
            return end + 2
    raise _not_jpegs(start)


def _not_jpegs(at: int) -> EngineError:
    return EngineError(f"jpeg segment is damaged: no whole JPEG at byte {at}; fetch it again")


_ENCODERS: dict[str, Callable[[Chunk, int, int], bytes]] = {
    "raw": _raw,
    "jpeg": _jpeg,
    "fmp4": _fmp4,
}
