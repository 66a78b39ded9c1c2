import dataclasses
import io

import av
import numpy as np
import pytest
from PIL import Image

from echo_ray.engine.clip import contact_sheet, write_clip
from echo_ray.errors import InvalidRequestError
from echo_ray.session.chunk import Chunk, DriftReading, frames_digest


def flat_chunk(index, count, colour, prompt="a", size=64):
    data = np.full((count, size, size, 3), colour, dtype=np.uint8).tobytes()
    return Chunk(index, data, count, size, size, frames_digest(data), DriftReading(0.0), prompt)


def test_clip_holds_every_frame_in_order(tmp_path):
    file = tmp_path / "clip.mp4"
    chunks = [flat_chunk(0, 9, (200, 0, 0)), flat_chunk(1, 12, (0, 0, 200))]
    assert write_clip(file, iter(chunks), 16) == 21
    with av.open(str(file)) as container:
        pictures = list(container.decode(video=0))
    assert [round(float(p.pts * p.time_base) * 16) for p in pictures] == list(range(21))
    assert (pictures[0].width, pictures[0].height) == (256, 256)
    red = [p.to_ndarray(format="rgb24")[..., 0].mean() > 100 for p in pictures]
    assert red == [True] * 9 + [False] * 12


def test_clip_refusals(tmp_path):
    with pytest.raises(InvalidRequestError, match="no chunk to write"):
        write_clip(tmp_path / "clip.mp4", [], 16)
    with pytest.raises(InvalidRequestError, match="cannot be written: No such file"):
        write_clip(tmp_path / "missing" / "clip.mp4", [flat_chunk(0, 1, 0)], 16)
    mixed = [flat_chunk(0, 1, 0), flat_chunk(1, 1, 0, size=32)]
    with pytest.raises(InvalidRequestError, match="chunk 1 is 32 x 32"):
        write_clip(tmp_path / "clip.mp4", mixed, 16)


def test_contact_sheet_places_the_middle_frames():
    chunks = [flat_chunk(n, 9, (60 * n, 100, 200), "a" if n < 2 else "b") for n in range(3)]
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(chunks, 2))).convert("RGB"))
    assert sheet.shape == (2 * (128 + 18) + 4, 2 * 132 + 4, 3)
    tile = [(100, 60), (100, 60 + 132), (100 + 146, 60)]
    assert [tuple(sheet[at]) for at in tile] == [(0, 100, 200), (60, 100, 200), (120, 100, 200)]
    assert tuple(sheet[100 + 146, 60 + 132]) == (24, 24, 27)
    unswitched = [dataclasses.replace(c, prompt="a") for c in chunks]
    assert contact_sheet(unswitched, 2) != contact_sheet(chunks, 2)


def test_contact_sheet_refusals():
    with pytest.raises(InvalidRequestError, match="0 chunks"):
        contact_sheet([], 4)
    with pytest.raises(InvalidRequestError, match="0 columns"):
        contact_sheet([flat_chunk(0, 1, 0)], 0)
