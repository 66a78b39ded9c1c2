"""Shapes are where they should be, and captions say what is to be seen."""

from __future__ import annotations

import numpy as np
import pytest

from echo_ray.model.words import read_prompt
from echo_ray.scenes.clips import make_clip
from echo_ray.scenes.scripts import chunk_of_frames
from echo_ray.scenes.world import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOUR_RGB,
    COLOURS,
    SHAPES,
    Frames,
    bounce,
    coverage,
    random_groups,
    render,
)


def one_object(shape: str, x: float, y: float, radius: float, visible: bool = True) -> Frames:
    def cell(value: float | int) -> np.ndarray:
        return np.array([[value]])

    return Frames(
        background_T=np.array([list(BACKGROUNDS).index("white")]),
        x_TO=cell(x).astype(np.float32),
        y_TO=cell(y).astype(np.float32),
        radius_TO=cell(radius).astype(np.float32),
        colour_TO=cell(list(COLOURS).index("red")),
        shape_TO=cell(SHAPES.index(shape)),
        visible_TO=cell(visible).astype(bool),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_drawn_in_its_colour_at_its_place(shape: str) -> None:
    picture, covered = render(one_object(shape, 20.0, 40.0, 10.0), 64, 64)
    assert np.allclose(picture[0, :, 40, 20], COLOUR_RGB[0])
    assert np.allclose(picture[0, :, 5, 60], BACKGROUND_RGB[1])
    ys, xs = np.nonzero(covered[0] > 0.5)
    assert abs(xs.mean() + 0.5 - 20) < 0.5
    assert xs.max() - xs.min() <= 20
    assert ys.max() - ys.min() <= 20


def test_shapes_differ_as_their_names_say() -> None:
    line = np.linspace(-12, 12, 97, dtype=np.float32)
    dy, dx = np.meshgrid(line, line, indexing="ij")
    masks = {name: coverage(i, dx, dy, np.full_like(dx, 10)) > 0.5 for i, name in enumerate(SHAPES)}
    corner = (np.abs(dx - 8) < 0.3) & (np.abs(dy - 8) < 0.3)
    assert masks["square"][corner].all()
    assert not masks["ball"][corner].any()
    widths = masks["triangle"].sum(axis=1)
    rows = widths[widths > 0]
    assert rows[-1] > 4 * rows[0], "a triangle stands on its widest row"


def test_an_invisible_object_leaves_only_background() -> None:
    picture, covered = render(one_object("ball", 20, 20, 10, visible=False), 32, 32)
    assert not covered.any()
    assert np.allclose(picture, BACKGROUND_RGB[1][None, :, None, None])


def test_objects_bounce_between_the_walls_at_constant_speed() -> None:
    start, step = np.array([20.0], dtype=np.float32), np.array([1.7], dtype=np.float32)
    low, high = np.array([8.0], dtype=np.float32), np.array([56.0], dtype=np.float32)
    x = bounce(start, step, 200, low, high)[:, 0]
    assert x.min() >= 8
    assert x.max() <= 56
    assert x.max() - x.min() > 45
    moves = np.abs(np.diff(x))
    assert np.median(moves) == pytest.approx(1.7, abs=1e-3)
    assert moves.max() <= 1.7 + 1e-3


def test_random_groups_stay_inside_and_repeat_by_seed() -> None:
    a = random_groups(np.random.default_rng(4), 32, 4, 64)
    b = random_groups(np.random.default_rng(4), 32, 4, 64)
    assert np.array_equal(a.x_TO, b.x_TO)
    assert (a.x_TO - a.radius_TO >= -1e-3).all()
    assert (a.y_TO + a.radius_TO <= 64 + 1e-3).all()
    assert a.background_T.reshape(32, 4).std(axis=1).max() == 0


def test_frames_belong_to_chunks() -> None:
    assert chunk_of_frames(3, 9, 12).tolist() == [0] * 9 + [1] * 12 + [2] * 12


@pytest.mark.parametrize("seed", range(40))
def test_a_clip_shows_what_its_captions_say(seed: int) -> None:
    clip = make_clip(np.random.default_rng(seed), 10, 64, 9, 12)
    script, frames = clip.script, clip.frames
    assert len(clip.captions) == 10
    assert frames.x_TO.shape[0] == 9 + 9 * 12
    chunk = chunk_of_frames(10, 9, 12)
    for k, caption in enumerate(clip.captions):
        words = caption.split()
        assert not read_prompt(caption)[2], "captions use known words only"
        assert ("empty" in words) == (not script.visible_KO[k].any())
        if "background" in words:
            named = words[words.index("background") - 1]
            assert named == list(BACKGROUNDS)[script.background_K[k]]
            assert (frames.background_T[chunk == k] == script.background_K[k]).all()
        for shape in SHAPES:
            said = words.count(shape)
            assert said in (0, int((script.shape_KO[k] == SHAPES.index(shape)).sum()))


def test_what_changes_is_always_said() -> None:
    for seed in range(60):
        clip = make_clip(np.random.default_rng(seed), 10, 64, 9, 12)
        colours = clip.script.colour_KO
        if (colours != colours[0]).any():
            for k, caption in enumerate(clip.captions):
                assert all(list(COLOURS)[c] in caption.split() for c in colours[k])


def test_it_comes_back_is_said_only_after_it_left() -> None:
    returns = 0
    for seed in range(80):
        clip = make_clip(np.random.default_rng(seed), 10, 64, 9, 12)
        for k, caption in enumerate(clip.captions):
            if "comes back" in caption:
                returns += 1
                before = clip.script.visible_KO[:k, 0]
                shown = np.flatnonzero(before)
                assert shown.size
                assert not before[shown[0] :].all()
    assert returns
