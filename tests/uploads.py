"""Clips as people upload them, made here."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

from echo_ray.session.engine_port import StreamShape

Picture = np.ndarray[Any, np.dtype[np.uint8]]
RED, GREEN, BLUE = (220, 30, 30), (30, 200, 40), (40, 60, 220)
SHAPE = StreamShape(
    model="m",
    fps=16,
    width=64,
    height=64,
    frames_per_chunk=12,
    first_chunk_frames=9,
    point_every=4,
)


def moving_square(number: int, width: int = 64, height: int = 64) -> Picture:
    """A red square on blue that moves two pixels to the right with every picture."""
    picture: Picture = np.full((height, width, 3), BLUE, np.uint8)
    left = 2 * number % (width - 16)
    picture[height // 2 - 8 : height // 2 + 8, left : left + 16] = RED
    return picture


def mp4(
    count: int = 32,
    *,
    fps: int = 16,
    width: int = 64,
    height: int = 64,
    picture: Callable[[int, int, int], Picture] = moving_square,
    times: list[int] | None = None,
    codec: str = "libx264",
    movflags: str = "",
) -> bytes:
    """A video; `times`: when each picture is shown, in 1 / fps."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4", options={"movflags": movflags} if movflags else {}) as c:
        stream = c.add_stream(codec, rate=fps)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.thread_count = 1
        if codec == "mpeg4":
            stream.bit_rate = 4_000_000
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number, width, height), format="rgb24")
            frame.pts = times[number] if times else number
            frame.time_base = Fraction(1, fps)
            c.mux(stream.encode(frame))
        c.mux(stream.encode(None))
    return out.getvalue()


def still(kind: str = "PNG", width: int = 64, height: int = 64, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.fromarray(moving_square(0, width, height)).convert(mode).save(out, kind)
    return out.getvalue()


def sound() -> bytes:
    """An MP4 without pictures."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def memory_bomb() -> bytes:
    """A few kilobytes that say they hold eighty million pictures."""
    data = mp4(24, movflags="frag_keyframe+empty_moov+default_base_moof")
    at = data.index(b"trun") + 4
    return data[:at] + struct.pack(">II", 0, 80_000_000) + data[at + 8 :]
