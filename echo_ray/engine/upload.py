"""An uploaded clip as frames of the stream's own size and rate.

MP4 video, or one PNG or JPEG picture. The kind is told from the first bytes, and exactly that
demuxer reads the rest; it may open nothing else, and what a file says of itself is believed only
within limits. One thread and exact arithmetic: equal clips give equal frames. Knows nothing about
sessions. What a stranger sends is first read in a process of its own: `clip_check.py`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NoReturn

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from echo_ray.config import LimitsSection
from echo_ray.errors import ClipInvalid, ClipTooLarge
from echo_ray.session.engine_port import StreamShape

KINDS = "an MP4 video, or a PNG or JPEG picture"
CODECS = ("h264", "hevc", "mpeg4", "vp9", "libdav1d", "av1")
"""Decoders that a video may ask for; av1 and libdav1d are the same format."""
MAX_RATE = 240
"""Pictures a second, at most: those that are decoded, whatever the stream's own rate is."""
MAX_ASPECT = 8
MAX_PIXELS_PER_SECOND = 3840 * 2160 * 30
"""Times `limits.clip_seconds`: what decoding one clip may cost."""
_UNTAGGED = 2
_UNTAGGED_HD_ROWS = 720
_SCALING = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.BITEXACT
)
_UNLIMITED = LimitsSection(clip_bytes=10**9, clip_seconds=10**9, clip_side=10**9)


@dataclass(frozen=True, slots=True)
class _Kind:
    magic: bytes
    at: int
    demuxer: str
    codecs: tuple[str, ...]
    still: bool


_KINDS = (
    _Kind(b"ftyp", 4, "mp4", CODECS, False),
    _Kind(b"\x89PNG\r\n\x1a\n", 0, "png_pipe", ("png",), True),
    _Kind(b"\xff\xd8\xff", 0, "jpeg_pipe", ("mjpeg",), True),
)


def read_clip(data: bytes, shape: StreamShape, limits: LimitsSection) -> bytes:
    """The clip as uint8 RGB frames, row-major [N, H, W, 3], N = first chunk + whole chunks.

    Pictures are scaled to cover the stream's size and cropped in the middle; each frame is the
    picture nearest to its time. What lies past `limits.clip_seconds`, and what is over a whole
    number of chunks, is dropped; too short a clip holds its last picture through the first chunk.
    Raises `ClipInvalid`, `ClipTooLarge`.
    """
    most = whole_chunks(limits.clip_seconds * shape.fps, shape)
    frames = list(_frames(data, shape, limits, most))
    frames += frames[-1:] * (shape.first_chunk_frames - len(frames))
    return b"".join(frames[: whole_chunks(len(frames), shape)])


def count_frames(data: bytes, shape: StreamShape, limits: LimitsSection) -> int:
    """How many frames `read_clip` returns, having made each but kept none. Raises as it does."""
    most = whole_chunks(limits.clip_seconds * shape.fps, shape)
    return whole_chunks(sum(1 for _ in _frames(data, shape, limits, most)), shape)


def read_taken_clip(data: bytes, shape: StreamShape, frames: int) -> bytes:
    """`read_clip` again of a clip that once gave `frames`, whatever the limits are by now.

    Raises `ClipInvalid` if it gives fewer.
    """
    taken = list(_frames(data, shape, _UNLIMITED, frames))
    if frames == shape.first_chunk_frames:
        taken += taken[-1:] * (frames - len(taken))
    if len(taken) != frames:
        raise ClipInvalid(
            f"clip gives {len(taken)} frames where it gave {frames} when it was uploaded; "
            "it needs the PyAV release that it was taken with"
        )
    return b"".join(taken)


def whole_chunks(frames: int, shape: StreamShape) -> int:
    """The largest number of frames that chunks from the first on hold; at least the first one."""
    beyond = max(0, frames - shape.first_chunk_frames)
    return shape.first_chunk_frames + beyond // shape.frames_per_chunk * shape.frames_per_chunk


def _frames(data: bytes, shape: StreamShape, limits: LimitsSection, most: int) -> Iterator[bytes]:
    """At least one and at most `most` frames at the stream's rate, each scaled once."""
    kind = _kind_of(data, limits)
    given = 0
    scaler = _Scaler(shape)
    try:
        with _opened(data, kind, limits) as container:
            stream = _video(container, kind, limits)
            pictures = _pictures(container, stream, limits, still=kind.still)
            for picture, end_s in _timed(pictures, _rate(stream, shape)):
                scaled = b""
                # Frame n stands for the time n / fps, and for the half frame around it.
                while given < most and Fraction(given, shape.fps) < end_s:
                    scaled = scaled or scaler.frame(picture)
                    yield scaled
                    given += 1
                if given >= most:
                    return
    except (av.FFmpegError, MemoryError) as error:
        # A file that breaks off is damaged, however much of it could be read.
        raise _unreadable(error) from error
    if given == 0:
        raise ClipInvalid(f"clip holds no picture; send {KINDS}", param="clip")


def _kind_of(data: bytes, limits: LimitsSection) -> _Kind:
    if not data:
        raise ClipInvalid(f"clip is empty; send {KINDS}", param="clip")
    if len(data) > limits.clip_bytes:
        raise ClipTooLarge(
            f"clip has {len(data)} bytes; at most {limits.clip_bytes} (limits.clip_bytes): "
            "send a shorter or smaller one",
            param="clip",
        )
    for kind in _KINDS:
        if data[kind.at : kind.at + len(kind.magic)] == kind.magic:
            if kind.demuxer == "png_pipe" and len(data) >= 24:
                # Before any decoder sees it; other kinds tell their size when they are opened.
                _check_size(_number(data, 16), _number(data, 20), limits)
            return kind
    raise ClipInvalid(f"clip begins with {data[:12].hex(' ')}: it is not {KINDS}", param="clip")


def _number(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")


def _opened(data: bytes, kind: _Kind, limits: LimitsSection) -> Any:
    # Decoders round sizes up to their blocks.
    pixels = min((limits.clip_side + 128) ** 2, 2**31 - 1)
    return av.open(
        io.BytesIO(data),
        "r",
        format=kind.demuxer,
        options={"threads": "1", "max_pixels": str(pixels)},
        container_options={
            "codec_whitelist": ",".join(kind.codecs),
            "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,png_pipe,jpeg_pipe",
            "protocol_whitelist": "none",
        },
        io_open=_open_nothing,
        metadata_errors="replace",
    )


def _open_nothing(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise ClipInvalid("clip refers to another file; send one that holds everything", param="clip")


def _video(container: Any, kind: _Kind, limits: LimitsSection) -> Any:
    stream = container.streams.best("video")
    if stream is None:
        raise ClipInvalid(f"clip has no video track; send {KINDS}", param="clip")
    context = stream.codec_context
    if context is None or context.codec.name not in kind.codecs:
        name = "an unknown format" if context is None else context.codec.name
        raise ClipInvalid(
            f"clip is coded as {name}; known: {', '.join(CODECS)}, png, mjpeg", param="clip"
        )
    _check_size(context.width, context.height, limits)
    context.thread_count = 1
    context.options = {"max_pixels": container.options["max_pixels"]}
    return stream


def _check_size(width: int, height: int, limits: LimitsSection) -> None:
    if max(width, height) > limits.clip_side:
        raise ClipTooLarge(
            f"clip has pictures of {width} x {height}; a side may have at most {limits.clip_side} "
            "(limits.clip_side): scale it down",
            param="clip",
        )
    if min(width, height) < 1:
        raise ClipInvalid(
            f"clip has pictures of {width} x {height}: it is damaged; send {KINDS}", param="clip"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ClipInvalid(
            f"clip has pictures of {width} x {height}; one side may be at most {MAX_ASPECT} times "
            "the other: crop it",
            param="clip",
        )


def _pictures(
    container: Any, stream: Any, limits: LimitsSection, *, still: bool
) -> Iterator[av.VideoFrame]:
    """Decoded pictures, each within the limits, and together too."""
    most = limits.clip_seconds * MAX_RATE
    pixels = limits.clip_seconds * MAX_PIXELS_PER_SECOND
    for number, picture in enumerate(container.decode(stream)):
        _check_size(picture.width, picture.height, limits)
        pixels -= picture.width * picture.height
        if number >= most or pixels < 0:
            raise ClipTooLarge(
                f"clip costs too much to decode: over {most} pictures or "
                f"{limits.clip_seconds * MAX_PIXELS_PER_SECOND} pixels before "
                f"{limits.clip_seconds} s (limits.clip_seconds); lower its frame rate or its size",
                param="clip",
            )
        yield picture
        if still:
            return


def _rate(stream: Any, shape: StreamShape) -> Fraction:
    """The stream's average rate, or the session's if it tells none that is possible."""
    rate = stream.average_rate
    return Fraction(rate) if rate and 0 < rate <= MAX_RATE else Fraction(shape.fps)


def _timed(
    pictures: Iterable[av.VideoFrame], rate: Fraction
) -> Iterator[tuple[av.VideoFrame, Fraction]]:
    """Each picture with the time, from the first one on, at which the next one is nearer.

    Where stamps are missing or do not rise, pictures follow each other at the average rate.
    """
    start: Fraction | None = None
    before: tuple[av.VideoFrame, Fraction] | None = None
    for picture in pictures:
        stamp = _stamp(picture)
        if start is None:
            start = stamp
        if before is None:
            at = Fraction(0)
        elif stamp is None or start is None or stamp - start <= before[1]:
            at = before[1] + 1 / rate
        else:
            at = stamp - start
        if before is not None:
            yield before[0], (before[1] + at) / 2
        before = picture, at
    if before is not None:
        yield before[0], before[1] + 1 / rate


def _stamp(picture: av.VideoFrame) -> Fraction | None:
    if picture.pts is None or not picture.time_base:
        return None
    return Fraction(picture.pts * picture.time_base)


class _Scaler:
    """Pictures scaled to cover the stream's size, turned upright, the middle cut out."""

    def __init__(self, shape: StreamShape) -> None:
        self._width, self._height = shape.width, shape.height
        self._reformatter = VideoReformatter()

    def frame(self, picture: av.VideoFrame) -> bytes:
        turns = round(picture.rotation / 90) % 4
        width, height = self._width, self._height
        if turns % 2:
            width, height = height, width
        scaled_width = max(width, -(-picture.width * height // picture.height))
        scaled_height = max(height, -(-picture.height * width // picture.width))
        scaled = self._reformatter.reformat(
            picture,
            scaled_width,
            scaled_height,
            "rgb24",
            src_colorspace=_colours(picture),
            interpolation=_SCALING,
            threads=1,
        )
        pixels_HWC = scaled.to_ndarray()
        top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
        return np.rot90(pixels_HWC[top : top + height, left : left + width], turns).tobytes()


def _colours(picture: av.VideoFrame) -> Colorspace | None:
    """The matrix of an untagged picture, as players guess it; None: the picture says."""
    if picture.colorspace != _UNTAGGED:
        return None
    return Colorspace.ITU709 if picture.height >= _UNTAGGED_HD_ROWS else Colorspace.ITU601


def _unreadable(error: Exception) -> ClipInvalid:
    return ClipInvalid(
        f"clip cannot be read ({type(error).__name__}); send {KINDS} that plays elsewhere",
        param="clip",
    )
