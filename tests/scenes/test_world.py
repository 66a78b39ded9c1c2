"""Shapes are where they should be and look as they are called."""

from __future__ import annotations

import numpy as np
import pytest

from echo_ray.scenes.world import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOUR_RGB,
    COLOURS,
    SHAPES,
    Frames,
    bounce,
    coverage,
    fold,
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


def test_random_objects_of_every_shape_and_number_are_drawn() -> None:
    frames = random_groups(np.random.default_rng(5), 200, 4, 64)
    assert set(frames.shape_TO.ravel()) == set(range(len(SHAPES)))
    assert set(frames.visible_TO.sum(axis=1)) == {0, 1, 2}


def test_a_straight_way_is_folded_at_the_walls() -> None:
    low, high, places = (
        np.array(values, dtype=np.float32) for values in ([10], [20], [12, 22, 31, 8, -3])
    )
    assert fold(places, low, high).tolist() == [12, 18, 11, 12, 17]
