import io
import json

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from echo_ray.engine import frames
from echo_ray.engine.boxes import boxes, find_box, place_fragment
from echo_ray.errors import EngineError, InvalidRequestError
from echo_ray.session.chunk import Chunk, DriftReading, frames_digest

FPS = 16


def make_chunk(index=0, count=12, height=64, width=64):
    """A moving gradient: smooth, in colour, different in every frame of every chunk."""
    y, x = np.mgrid[0:height, 0:width]
    shots = [
        np.stack(
            [x * 255 // width, y * 255 // height, 40 * (x + y) // width + (7 * index + 5 * t) % 90],
            -1,
        )
        for t in range(count)
    ]
    data = np.stack(shots).astype(np.uint8).tobytes()
    drift = DriftReading(0.0)
    return Chunk(index, data, count, height, width, frames_digest(data), drift, "a red circle")


def decoded(segment):
    with av.open(io.BytesIO(segment)) as container:
        return list(container.decode(video=0))


def psnr(pictures, chunk):
    seen = np.stack([p.to_ndarray(format="rgb24") for p in pictures]).astype(float)
    return 10 * np.log10(255**2 / ((seen - frames.pixels(chunk)) ** 2).mean())


def avcc(segment):
    at = segment.index(b"avcC")
    return segment[at - 4 : at - 4 + int.from_bytes(segment[at - 4 : at], "big")]


def test_raw_is_the_frames_and_carries_the_digest():
    chunk = make_chunk()
    segment = frames.encode(chunk, "raw", fps=FPS, start_frame=0)
    assert segment == chunk.frames
    assert frames_digest(segment) == chunk.digest


@pytest.mark.parametrize("count", [1, 9, 12])
def test_jpeg_segment_splits_into_its_frames(count):
    chunk = make_chunk(count=count)
    pictures = frames.split_jpegs(frames.encode(chunk, "jpeg", fps=FPS, start_frame=0))
    opened = [Image.open(io.BytesIO(p)) for p in pictures]
    assert [o.size for o in opened] == [(64, 64)] * count
    seen = np.stack([np.asarray(o) for o in opened]).astype(float)
    assert ((seen - frames.pixels(chunk)) ** 2).mean() < 12


@pytest.mark.parametrize("damage", [b"", b"\xff\xd8", b"\xff\xd8\xff\xda\x00\x02\x11"])
def test_split_refuses_what_is_not_whole_jpegs(damage):
    whole = frames.encode(make_chunk(count=1), "jpeg", fps=FPS, start_frame=0)
    with pytest.raises(EngineError, match="damaged"):
        frames.split_jpegs(whole + (damage or b"tail"))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_split_never_fails_otherwise(data):
    try:
        parts = frames.split_jpegs(data)
    except EngineError:
        return
    assert b"".join(parts) == data


@pytest.mark.parametrize(
    ("width", "height", "count"), [(64, 64, 9), (64, 64, 12), (64, 64, 1), (832, 480, 9)]
)
def test_fmp4_segment_decodes_alone(width, height, count):
    chunk = make_chunk(3, count, height, width)
    segment = frames.encode(chunk, "fmp4", fps=FPS, start_frame=33)
    pictures = decoded(segment)
    assert [kind for kind, _, _ in boxes(segment)] == [b"ftyp", b"moov", b"moof", b"mdat"]
    assert [p.pts * p.time_base * FPS for p in pictures] == list(range(33, 33 + count))
    assert [p.key_frame for p in pictures] == [True] + [False] * (count - 1)
    assert all(p.pict_type != av.video.frame.PictureType.B for p in pictures)
    assert psnr(pictures, chunk) > 38
    first = pictures[0]
    assert (first.format.name, int(first.colorspace)) == ("yuv420p", 1)
    assert (int(first.color_primaries), int(first.color_trc), int(first.color_range)) == (1, 1, 1)


def test_fmp4_segments_join_into_one_stream():
    sizes = [9, 12, 12, 1, 12]
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    chunks = [make_chunk(n, count) for n, count in enumerate(sizes)]
    segments = [
        frames.encode(c, "fmp4", fps=FPS, start_frame=s)
        for c, s in zip(chunks, starts, strict=True)
    ]
    fragments = [s[find_box(s, b"moof")[0] :] for s in segments]
    header = segments[0][: find_box(segments[0], b"moof")[0]]
    pictures = decoded(header + b"".join(fragments))
    assert [p.pts * p.time_base * FPS for p in pictures] == list(range(sum(sizes)))
    for chunk, start in zip(chunks, starts, strict=True):
        assert psnr(pictures[start : start + chunk.num_frames], chunk) > 38


def test_fmp4_samples_last_until_the_next_segment():
    segment = frames.encode(make_chunk(count=9), "fmp4", fps=FPS, start_frame=0)
    with av.open(io.BytesIO(segment)) as container:
        lasting = [p.duration * p.time_base for p in container.demux(video=0) if p.size]
    assert [d * FPS for d in lasting] == [1] * 9


def test_fmp4_header_is_the_same_for_every_chunk_and_names_the_mime():
    one = frames.encode(make_chunk(0, 9), "fmp4", fps=FPS, start_frame=0)
    other = frames.encode(make_chunk(7, 12), "fmp4", fps=FPS, start_frame=93)
    assert one[: find_box(one, b"moof")[0]] == other[: find_box(other, b"moof")[0]]
    assert one != other
    wide = frames.encode(make_chunk(0, 1, 480, 832), "fmp4", fps=FPS, start_frame=0)
    for segment in (one, other, wide):
        codec = f"avc1.{avcc(segment)[9:12].hex()}"
        assert frames.mime("fmp4") == f"video/mp4; codecs={json.dumps(codec)}"


def test_fmp4_place_holds_after_a_year():
    start = 365 * 86400 * FPS
    segment = frames.encode(make_chunk(), "fmp4", fps=FPS, start_frame=start)
    assert decoded(segment)[0].pts == start * frames.TICKS_PER_FRAME


def test_equal_chunks_give_equal_bytes():
    for fmt in frames.FORMATS:
        one = frames.encode(make_chunk(2), fmt, fps=FPS, start_frame=21)
        assert one == frames.encode(make_chunk(2), fmt, fps=FPS, start_frame=21)


@pytest.mark.parametrize("fmt", ["webm", "", "RAW", "fmp4 "])
def test_unknown_formats_are_refused_by_name(fmt):
    with pytest.raises(InvalidRequestError, match="known: raw, jpeg, fmp4"):
        frames.encode(make_chunk(), fmt, fps=FPS, start_frame=0)
    with pytest.raises(InvalidRequestError, match="known: raw, jpeg, fmp4"):
        frames.mime(fmt)


def test_impossible_arguments_are_refused():
    with pytest.raises(InvalidRequestError, match="start_frame -1"):
        frames.encode(make_chunk(), "fmp4", fps=FPS, start_frame=-1)
    with pytest.raises(InvalidRequestError, match="fps 0"):
        frames.encode(make_chunk(), "fmp4", fps=0, start_frame=0)
    with pytest.raises(InvalidRequestError, match="even width and height, not 63 x 64"):
        frames.encode(make_chunk(width=63), "fmp4", fps=FPS, start_frame=0)


@pytest.mark.parametrize("fmt", frames.FORMATS)
def test_frames_that_do_not_fit_the_size_are_refused(fmt):
    whole = make_chunk()
    torn = Chunk(0, whole.frames[:-3], 12, 64, 64, whole.digest, whole.drift, whole.prompt)
    with pytest.raises(EngineError, match="147453 bytes for 12 frames"):
        frames.encode(torn, fmt, fps=FPS, start_frame=0)


def test_boxes_and_fragments_refuse_what_is_not_mp4():
    segment = frames.encode(make_chunk(count=1), "fmp4", fps=FPS, start_frame=0)
    with pytest.raises(EngineError, match="bytes are left"):
        list(boxes(segment[:-1]))
    with pytest.raises(EngineError, match="has no box moof/nope"):
        find_box(segment, b"moof", b"nope")
    header = segment[: find_box(segment, b"moof")[0]]
    with pytest.raises(EngineError, match="once and in order"):
        place_fragment(header, decode_time=0, sequence=1)
