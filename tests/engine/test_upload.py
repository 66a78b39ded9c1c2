"""What uploaded clips become, and what is refused."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import cast

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uploads import BLUE, GREEN, RED, SHAPE, Picture, moving_square, mp4, sound, still

from echo_ray.config import LimitsSection
from echo_ray.engine import upload
from echo_ray.engine.upload import MAX_RATE, count_frames, read_clip, read_taken_clip
from echo_ray.errors import ClipInvalid, ClipTooLarge
from echo_ray.session.engine_port import StreamShape

LIMITS = LimitsSection()
FRAGMENTED = "frag_keyframe+empty_moov+default_base_moof"


def frames(
    data: bytes, *, width: int = 64, height: int = 64, limits: LimitsSection = LIMITS
) -> Picture:
    shape = replace(SHAPE, width=width, height=height)
    clip = read_clip(data, shape, limits)
    assert read_clip(data, shape, limits) == clip
    read: Picture = np.frombuffer(clip, np.uint8).reshape(-1, height, width, 3)
    assert (len(read) - 9) % 12 == 0
    assert count_frames(data, shape, limits) == len(read)
    assert read_taken_clip(data, shape, len(read)) == clip
    return read


def near(seen: object, colour: object, by: int = 12) -> bool:
    return bool(np.abs(np.asarray(seen, int) - np.asarray(colour, int)).max() <= by)


def numbers(read: Picture) -> list[int]:
    """Which pictures of `moving_square` these frames are."""
    reds = [np.flatnonzero(f[32, :, 0] > 130) for f in read]
    return [round(float(r.mean() - 7.5) / 2) for r in reds]


@pytest.mark.parametrize("movflags", ["", FRAGMENTED])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_pictures_come_in_order_up_to_a_whole_chunk(codec: str, movflags: str) -> None:
    read = frames(mp4(32, codec=codec, movflags=movflags))
    assert numbers(read) == list(range(21))
    assert near(read[0, 2, 2], BLUE)
    assert near(read[0, 32, 8], RED)


def test_each_frame_is_the_picture_nearest_to_its_time() -> None:
    assert numbers(frames(mp4(42, fps=32)))[:10] == list(range(0, 20, 2))
    assert numbers(frames(mp4(11, fps=8)))[:9] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    # Pictures at 0, 1, 2, 10, 11, ... sixteenths: the third is held until the fourth is nearer.
    jump = numbers(frames(mp4(20, times=[0, 1, 2, *range(10, 27)])))
    assert jump[:12] == [0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4]
    assert len(jump) == 21


def test_the_clock_begins_with_the_first_picture() -> None:
    assert numbers(frames(mp4(21, times=list(range(40, 61))))) == list(range(21))


def test_stamps_that_are_missing_or_do_not_rise_give_way_to_the_average_rate() -> None:
    def until(*stamps: int | None) -> list[float]:
        pictures = [SimpleNamespace(pts=s, time_base=Fraction(1, 10)) for s in stamps]
        timed = upload._timed(cast(Iterable[av.VideoFrame], pictures), Fraction(2))
        return [float(end_s) for _, end_s in timed]

    assert until(0, 5, 10) == [0.25, 0.75, 1.5]
    assert until(100, 102, 104) == [0.1, 0.3, 0.9]
    assert until(None, None, None) == [0.25, 0.75, 1.5]
    assert until(7, 7, 7) == [0.25, 0.75, 1.5]
    assert until(50, 10, 60) == [0.25, 0.75, 1.5]
    assert until() == []


def test_a_short_clip_holds_its_last_picture_through_the_first_chunk() -> None:
    assert numbers(frames(mp4(3))) == [0, 1, 2, 2, 2, 2, 2, 2, 2]
    assert numbers(frames(mp4(9))) == list(range(9))
    assert numbers(frames(mp4(20))) == list(range(9))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "L"), ("PNG", "1"), ("JPEG", "RGB")],
)
def test_a_still_picture_fills_the_first_chunk(kind: str, mode: str) -> None:
    read = frames(still(kind, mode=mode))
    assert read.shape == (9, 64, 64, 3)
    assert (read == read[0]).all()
    if mode.startswith("RGB"):
        assert near(read[0, 32, 8], RED)
        assert near(read[0, 60, 60], BLUE)


def test_what_lies_past_the_limit_is_cut_off() -> None:
    clip = mp4(80)
    long = frames(clip)
    assert len(long) == 69
    short = frames(clip, limits=LimitsSection(clip_seconds=2))
    assert (short == long[:21]).all()
    assert len(short) == 21
    assert read_taken_clip(clip, SHAPE, 21) == short.tobytes()
    with pytest.raises(ClipInvalid, match="gives 80 frames where it gave 81"):
        read_taken_clip(clip, SHAPE, 81)


def thirds(number: int, width: int, height: int) -> Picture:
    picture: Picture = np.full((height, width, 3), GREEN, np.uint8)
    if width > height:
        picture[:, : width // 4], picture[:, -(width // 4) :] = RED, BLUE
    else:
        picture[: height // 4], picture[-(height // 4) :] = RED, BLUE
    return picture


@pytest.mark.parametrize("size", [(128, 64), (64, 128), (512, 256), (32, 16)])
def test_pictures_cover_the_frame_and_the_middle_is_kept(size: tuple[int, int]) -> None:
    read = frames(mp4(9, width=size[0], height=size[1], picture=thirds))
    assert near(read[:, 16:-16, 16:-16], GREEN, 24)


def test_a_frame_need_not_be_square() -> None:
    read = frames(mp4(9, width=128, height=64, picture=thirds), width=96, height=48)
    assert read.shape == (9, 48, 96, 3)
    assert near(read[0, 24, 4], RED, 24)
    assert near(read[0, 24, 48], GREEN, 24)
    assert near(read[0, 24, -4], BLUE, 24)


def test_a_clip_that_is_to_be_turned_is_turned() -> None:
    data = mp4(9, width=128, height=64, picture=thirds)
    at = data.index(b"tkhd") + 4 + 40
    one = 0x10000
    # Columns of the matrix: a quarter turn clockwise.
    turned = struct.pack(">9i", 0, one, 0, -one, 0, 0, 64 * one, 0, 0x40000000)
    assert struct.unpack(">9i", data[at : at + 36])[0] == one
    read = frames(data[:at] + turned + data[at + 36 :], width=32, height=64)
    assert near(read[0, 4, 16], RED, 24)
    assert near(read[0, 32, 16], GREEN, 24)
    assert near(read[0, 60, 16], BLUE, 24)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "clip is empty"),
        (b"hello", "begins with 68 65 6c 6c 6f: it is not an MP4"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\nfile:///etc/passwd\n", "it is not an MP4"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "it is not an MP4"),
        (b"GIF89a" + bytes(40), "it is not an MP4"),
        (b"\x1aE\xdf\xa3" + bytes(40), "it is not an MP4"),
        (b"\0\0\0\x18ftypisom", "cannot be read"),
        (b"\0\0\0\x18ftypisom#EXTM3U\nfile:///etc/passwd\n", "cannot be read"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "pictures of 0 x 0"),
        (b"\xff\xd8\xff\xe0", "pictures of 0 x 0"),
        (still()[:60], "0 x 0: it is damaged"),
        (sound(), "no video track"),
        (mp4(3, codec="mjpeg"), "coded as mjpeg; known: h264"),
        (still(width=90, height=10), "90 x 10; one side may be at most 8 times"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_no_clip_is_refused(data: bytes, words: str) -> None:
    for read in (read_clip, count_frames):
        with pytest.raises(ClipInvalid, match=words) as caught:
            read(data, SHAPE, LIMITS)
        assert caught.value.param == "clip"


@pytest.mark.parametrize(
    ("data", "limits", "words"),
    [
        (mp4(3), LimitsSection(clip_bytes=100), "at most 100 .limits.clip_bytes"),
        (still(), LimitsSection(clip_side=63), "64 x 64; a side may have at most 63"),
        (still("JPEG"), LimitsSection(clip_side=63), "64 x 64; a side may have at most 63"),
        (mp4(3), LimitsSection(clip_side=63), "64 x 64; a side may have at most 63"),
        (
            mp4(MAX_RATE + 1, fps=1000, width=32, height=32, codec="mpeg4"),
            LimitsSection(clip_seconds=1),
            "over 240 pictures",
        ),
    ],
)
def test_what_is_too_large_is_refused(data: bytes, limits: LimitsSection, words: str) -> None:
    with pytest.raises(ClipTooLarge, match=words):
        read_clip(data, SHAPE, limits)


def test_the_size_in_the_stream_counts_and_not_only_the_one_in_the_header() -> None:
    data = bytearray(mp4(3, width=128, height=128))
    at = data.index(b"avc1", data.index(b"stsd")) + 4 + 24
    assert struct.unpack(">HH", data[at : at + 4]) == (128, 128)
    data[at : at + 4] = struct.pack(">HH", 32, 32)
    with pytest.raises((ClipTooLarge, ClipInvalid)):
        read_clip(bytes(data), SHAPE, LimitsSection(clip_side=64))


SMALL = StreamShape(
    model="m", fps=16, width=16, height=16, frames_per_chunk=4, first_chunk_frames=1, point_every=4
)
SEEDS = [mp4(12), mp4(12, movflags=FRAGMENTED), still(), still("JPEG")]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(SEEDS)))
    if draw(st.booleans()):
        data = data[: draw(st.integers(0, len(data)))]
    for _ in range(draw(st.integers(0, 8)) if data else 0):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@settings(max_examples=400, deadline=5000, database=None)
@given(damaged())
def test_damage_gives_frames_or_a_refusal_and_nothing_else(data: bytes) -> None:
    limits = LimitsSection(clip_seconds=2, clip_side=256)
    try:
        clip = read_clip(data, SMALL, limits)
    except (ClipInvalid, ClipTooLarge):
        return
    count, rest = divmod(len(clip), 16 * 16 * 3)
    assert (rest, (count - 1) % 4) == (0, 0)
    assert 1 <= count <= 32
    assert read_clip(data, SMALL, limits) == clip


def test_the_square_is_where_it_should_be() -> None:
    """The measure that these tests go by."""
    assert numbers(np.stack([moving_square(n) for n in range(20)])) == list(range(20))
