"""Fits the three shapes to soft masks of objects, in place and radius, by least squares.

Knows nothing of colours and backgrounds. Pixels may be unknown, because another object covers them
or because they are outside the frame; they neither pull the fit nor count in its overlap.

Shapes: N objects, K shapes, H W pixels, S side of a window round an object, P = N * K problems.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from echo_ray.scenes.world import RADII, SHAPES, Floats, Ints, coverage

WINDOW = 44
"""Side of the window: the largest shape, half of it outside of the frame, and room to move."""
EDGES = (5.0, 3.0, 2.0, 1.0, 1.0)
"""Width of the edge in each step of the fit; wide ones first, which see farther."""
WAYS: Floats = np.arange(WINDOW, dtype=np.float32) + np.float32(0.5 - WINDOW // 2)
"""Distances of the window's pixels from its middle."""
SOFT_EDGE = 4.0
"""A blurred object is compared with shapes whose edges are so wide; a sharp one with sharp ones."""
LONGEST_MOVE = 4.0
SMALLEST, LARGEST = 5.0, 17.0
AREA = np.array((3.1416, 3.0976, 1.7113), dtype=np.float32)
"""Of each shape at radius 1."""
DROP = np.array((0.0, 0.0, 0.2333), dtype=np.float32)
"""How far below its centre the middle of each shape's area lies, at radius 1."""


@dataclass(frozen=True)
class Fits:
    """The best place and radius of every shape for every object, and how well it fits."""

    x_NK: Floats
    y_NK: Floats
    radius_NK: Floats
    overlap_NK: Floats
    """Shared area over united area, among the known pixels."""
    inside_NK: Floats
    """Share of the shape that is inside the frame."""

    def pick(self, rows: Ints) -> Fits:
        """The fits of some objects."""
        return Fits(**{name: values[rows] for name, values in vars(self).items()})

    def put(self, rows: Ints, fits: Fits) -> None:
        """Replace the fits of some objects."""
        for name, values in vars(self).items():
            values[rows] = vars(fits)[name]


def fit_shapes(mask_NHW: Floats, known_NHW: Floats, x_N: Ints, y_N: Ints) -> Fits:
    """Fit every shape to every mask, looking in a window round the pixel (x, y)."""
    height, width = mask_NHW.shape[1:]
    mask_NSS = _windows(mask_NHW, x_N, y_N)
    weight_NSS = _windows(known_NHW, x_N, y_N)
    shapes = len(SHAPES)
    # The window's middle is (0, 0) until the end.
    mass = (mask_NSS * weight_NSS).sum(axis=(1, 2)) + 1e-3
    middle_x = ((mask_NSS * weight_NSS).sum(axis=1) @ WAYS) / mass
    middle_y = ((mask_NSS * weight_NSS).sum(axis=2) @ WAYS) / mass
    radius_NK = np.clip(np.sqrt(mass[:, None] / AREA), *_table_range())
    place = np.stack(
        [
            np.repeat(middle_x[:, None], shapes, axis=1),
            middle_y[:, None] - DROP * radius_NK,
            radius_NK,
        ]
    ).astype(np.float32)
    overlap_NK = np.empty((len(x_N), shapes), dtype=np.float32)
    inside_NK = np.empty_like(overlap_NK)
    for k in range(shapes):
        place[:, :, k] = _descend(k, place[:, :, k], mask_NSS, weight_NSS)
        sharp, soft = (_cover(k, place[:, :, k], edge) for edge in (1.0, SOFT_EDGE))
        overlap_NK[:, k] = np.maximum(
            _overlap(sharp, mask_NSS, weight_NSS), _overlap(soft, mask_NSS, weight_NSS)
        )
        in_frame = _in_frame(x_N, width)[:, None, :] & _in_frame(y_N, height)[:, :, None]
        area = AREA[k] * place[2, :, k] ** 2
        inside_NK[:, k] = np.clip((sharp * in_frame).sum(axis=(1, 2)) / area, 0, 1)
    return Fits(
        x_NK=place[0] + x_N[:, None],
        y_NK=place[1] + y_N[:, None],
        radius_NK=place[2],
        overlap_NK=overlap_NK,
        inside_NK=inside_NK,
    )


def draw(fits: Fits, height: int, width: int) -> Floats:
    """Coverage [N, H, W] of each object's best shape over a whole frame."""
    xs = np.arange(width, dtype=np.float32)[None, None, :] + 0.5
    ys = np.arange(height, dtype=np.float32)[None, :, None] + 0.5
    best = fits.overlap_NK.argmax(axis=1)
    cover_NHW = np.zeros((len(best), height, width), dtype=np.float32)
    for k in range(len(SHAPES)):
        rows = np.flatnonzero(best == k)
        dx = xs - fits.x_NK[rows, k, None, None]
        dy = ys - fits.y_NK[rows, k, None, None]
        cover_NHW[rows] = coverage(k, dx, dy, fits.radius_NK[rows, k, None, None])
    return cover_NHW


def _table_range() -> tuple[float, float]:
    return min(RADII.values()), max(RADII.values())


def _windows(plane_NHW: Floats, x_N: Ints, y_N: Ints) -> Floats:
    """Windows [N, S, S]; zero outside of the frame."""
    half = WINDOW // 2
    padded = np.pad(plane_NHW, ((0, 0), (half, half), (half, half)))
    side = np.arange(WINDOW)
    rows = (y_N[:, None] + side)[:, :, None]
    columns = (x_N[:, None] + side)[:, None, :]
    return np.asarray(padded[np.arange(len(x_N))[:, None, None], rows, columns])


def _in_frame(middle_N: Ints, length: int) -> np.ndarray:
    at = middle_N[:, None] + np.arange(WINDOW) - WINDOW // 2
    return np.asarray((at >= 0) & (at < length))


def _cover(shape: int, place: Floats, edge: float) -> Floats:
    """Coverage [N, S, S] of a shape at x, y, radius; its edge is `edge` pixels wide."""
    ways = np.arange(WINDOW, dtype=np.float32) + 0.5 - WINDOW // 2
    x, y, radius = place[:, :, None, None] / np.float32(edge)
    ways = ways / np.float32(edge)
    return coverage(shape, ways[None, None, :] - x, ways[None, :, None] - y, radius)


def _overlap(cover_NSS: Floats, mask_NSS: Floats, weight_NSS: Floats) -> Floats:
    shared = (np.minimum(cover_NSS, mask_NSS) * weight_NSS).sum(axis=(1, 2))
    united = (np.maximum(cover_NSS, mask_NSS) * weight_NSS).sum(axis=(1, 2))
    return np.asarray(shared / (united + 1e-3))


def _descend(shape: int, place: Floats, mask_NSS: Floats, weight_NSS: Floats) -> Floats:
    """Gauss-Newton steps from `place` [3, N] towards the least squared error."""
    rows, pixels = len(mask_NSS), WINDOW * WINDOW
    damping = np.eye(3, dtype=np.float32)
    slopes = np.zeros((rows, 3, WINDOW, WINDOW), dtype=np.float32)
    for edge in EDGES:
        cover = _cover(shape, place, edge)
        x, y, radius = place[:, :, None, None]
        # A shape that moves by a pixel looks like its neighbour pixels; one that grows moves
        # outwards, the more the farther from its centre.
        slopes[:, 0, :, 1:-1] = (cover[:, :, :-2] - cover[:, :, 2:]) / 2
        slopes[:, 1, 1:-1] = (cover[:, :-2] - cover[:, 2:]) / 2
        slopes[:, 2] = (
            slopes[:, 0] * (WAYS[None, None, :] - x) + slopes[:, 1] * (WAYS[None, :, None] - y)
        ) / radius
        error = (mask_NSS - cover).reshape(rows, pixels, 1)
        flat = slopes.reshape(rows, 3, pixels)
        weighted = flat * weight_NSS.reshape(rows, 1, pixels)
        normal = weighted @ flat.swapaxes(1, 2) + damping
        move = np.linalg.solve(normal, weighted @ error)[:, :, 0].T
        place = place + np.clip(move, -LONGEST_MOVE, LONGEST_MOVE)
        place[2] = np.clip(place[2], SMALLEST, LARGEST)
    return np.asarray(place, dtype=np.float32)
