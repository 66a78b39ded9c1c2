"""Reads a scene back from frames: background, objects, and how sure each answer is.

No learning. Pixels are named after the nearest palette colour; a frame's background is its most
frequent background colour; an object is a colour with enough pixels. Each pixel is then taken as a
mixture of two of the colours that are there, which gives every object a soft mask, and the three
shapes are fitted to it in place and radius. The best overlap names the shape; its lead over the
second best says how sure that is. Objects of one frame have different colours, as everywhere in
this world, and an object counts while at least half of it is inside the frame.

Shapes: T frames, H W pixels, F frames of a group, K objects of each, N = F * K objects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from echo_ray.errors import ConfigError
from echo_ray.scenes.fitting import Fits, draw, fit_shapes
from echo_ray.scenes.palette import name_pixels, unmix
from echo_ray.scenes.world import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOUR_RGB,
    COLOURS,
    RADII,
    SHAPES,
    Floats,
    Ints,
)

COLOUR_NAMES = tuple(COLOURS)
BACKGROUND_NAMES = tuple(BACKGROUNDS)
MOST_OBJECTS = 3
CORE_PIXELS = 20
"""Pixels of a colour from which on an object is looked for."""
LEAST_OVERLAP = 0.4
LEAST_INSIDE = 0.5
TOUCHING = 3.0
"""Pixels that two fitted shapes share from which on one is taken to be on top."""
SURE_OVERLAP = 0.9
SURE_LEAD = 0.06
"""Overlap of the best shape, and its lead over the second, from which on the shape is sure."""
BLOCK = 16
"""Frames worked on at a time, so that the arrays stay in the processor's cache."""


@dataclass(frozen=True, kw_only=True)
class SeenObject:
    """An object; x, y and radius in pixels, measured as `world.Frames` measures them."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    inside: float
    """Share of the object that is inside the frame."""
    colour_confidence: float
    """That there is an object of this colour: 1 on true frames, low for a smear."""
    shape_confidence: float

    @property
    def confidence(self) -> float:
        """That the whole answer is right, 0 to 1."""
        return min(self.colour_confidence, self.shape_confidence)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one frame shows; the largest object first."""

    background: str
    background_confidence: float
    objects: tuple[SeenObject, ...]
    unexplained: float
    """Share of the pixels that have neither the background's nor an object's colour."""


def detect(pixels: NDArray[np.float32] | NDArray[np.uint8]) -> list[Seen]:
    """What each frame shows; frames are float [T, 3, H, W] in [0, 1] or uint8 [T, H, W, 3]."""
    rgb_T3HW = _as_planes(pixels)
    return [
        seen
        for start in range(0, len(rgb_T3HW), BLOCK)
        for seen in _detect_block(rgb_T3HW[start : start + BLOCK])
    ]


def _as_planes(pixels: NDArray[np.float32] | NDArray[np.uint8]) -> Floats:
    is_bytes = pixels.dtype == np.uint8
    if pixels.ndim != 4 or pixels.shape[3 if is_bytes else 1] != 3:
        wanted = "[T, H, W, 3]" if is_bytes else "[T, 3, H, W]"
        raise ConfigError(f"frames: {pixels.dtype} of shape {list(pixels.shape)}; give {wanted}")
    if is_bytes:
        planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32)
        return planes / np.float32(255)
    return np.ascontiguousarray(pixels, dtype=np.float32)


def _detect_block(rgb_T3HW: Floats) -> list[Seen]:
    named = name_pixels(rgb_T3HW)
    area = rgb_T3HW[0, 0].size
    behind_TB = named.count_TC[:, : len(BACKGROUNDS)]
    counts = named.count_TC[:, len(BACKGROUNDS) :]
    background_T = behind_TB.argmax(axis=1)
    ranked = np.argsort(-counts, axis=1, kind="stable")[:, :MOST_OBJECTS]
    pixels_TK = np.take_along_axis(counts, ranked, axis=1)
    number_T = (pixels_TK >= CORE_PIXELS).sum(axis=1)
    explained_T = behind_TB.max(axis=1) + pixels_TK.sum(axis=1)
    found: list[tuple[SeenObject, ...]] = [()] * len(rgb_T3HW)
    for number in range(1, MOST_OBJECTS + 1):
        group = np.flatnonzero(number_T == number)
        if group.size:
            seen = _objects(
                rgb_T3HW[group],
                named.label_THW[group],
                background_T[group],
                ranked[group, :number],
            )
            for t, objects in zip(group, seen, strict=True):
                found[t] = objects
    return [
        Seen(
            background=BACKGROUND_NAMES[background_T[t]],
            background_confidence=_clearness(behind_TB[t], area),
            objects=found[t],
            unexplained=float(1 - explained_T[t] / area),
        )
        for t in range(len(rgb_T3HW))
    ]


def _clearness(counts: Ints, area: int) -> float:
    """How clearly the most frequent background covers the frame, 0 to 1."""
    second, first = np.sort(counts)[-2:]
    # Two big objects cover a quarter of a frame of the shipped size.
    return float(np.clip((first - second) / (0.6 * area), 0, 1))


def _objects(
    rgb_F3HW: Floats, label_FHW: NDArray[np.int8], background_F: Ints, colour_FK: Ints
) -> list[tuple[SeenObject, ...]]:
    """Objects of F frames that have K candidate colours each."""
    behind = BACKGROUND_RGB[background_F][:, None]
    mask_FKHW = unmix(rgb_F3HW, np.concatenate([behind, COLOUR_RGB[colour_FK]], axis=1))
    frames, number, height, width = mask_FKHW.shape
    core_FKHW = label_FHW[:, None] == (colour_FK + len(BACKGROUNDS))[:, :, None, None]
    others_FKHW = mask_FKHW.sum(axis=1, keepdims=True) - mask_FKHW
    mask_NHW = mask_FKHW.reshape(-1, height, width)
    core_NHW = core_FKHW.reshape(-1, height, width)
    known_NHW = np.clip(1 - others_FKHW, 0, 1).reshape(-1, height, width)
    x_N, y_N = _median(core_NHW.sum(axis=1)), _median(core_NHW.sum(axis=2))
    fits = fit_shapes(mask_NHW, known_NHW, x_N, y_N)
    cover_NHW = draw(fits, height, width)
    top = _on_top(cover_NHW.reshape(mask_FKHW.shape), mask_FKHW)
    if top.size:
        # Nothing hides these: what they do not cover is known to be something else.
        clear = np.ones_like(mask_NHW[top])
        fits.put(top, fit_shapes(mask_NHW[top], clear, x_N[top], y_N[top]))
        cover_NHW[top] = draw(fits.pick(top), height, width)
    inner_NHW = (cover_NHW > 0.5) * known_NHW
    purity_N = (inner_NHW * core_NHW).sum(axis=(1, 2)) / (inner_NHW.sum(axis=(1, 2)) + 1e-3)
    objects = [
        _object(COLOUR_NAMES[colour], fits, n, float(purity_N[n]))
        for n, colour in enumerate(colour_FK.reshape(-1))
    ]
    return [_kept(objects[f * number : (f + 1) * number]) for f in range(frames)]


def _median(counts_NL: Ints) -> Ints:
    """Where half of the counts lie to either side: stray pixels hardly move it."""
    running = counts_NL.cumsum(axis=1)
    return np.asarray((2 * running < running[:, -1:]).sum(axis=1))


def _on_top(cover_FKHW: Floats, mask_FKHW: Floats) -> Ints:
    """Objects n that cover another one where both fitted shapes are."""
    number = mask_FKHW.shape[1]
    top: set[int] = set()
    for i in range(number):
        for j in range(i + 1, number):
            both = cover_FKHW[:, i] * cover_FKHW[:, j]
            shared = both.sum(axis=(1, 2))
            i_wins = (both * (mask_FKHW[:, i] - mask_FKHW[:, j])).sum(axis=(1, 2)) > 0
            touching = np.flatnonzero(shared > TOUCHING)
            top.update(int(f * number + (i if i_wins[f] else j)) for f in touching)
    return np.array(sorted(top), dtype=np.int64)


def _object(colour: str, fits: Fits, n: int, purity: float) -> SeenObject:
    best = int(fits.overlap_NK[n].argmax())
    second, first = np.sort(fits.overlap_NK[n])[-2:]
    fit = float(np.clip((first - LEAST_OVERLAP) / (SURE_OVERLAP - LEAST_OVERLAP), 0, 1))
    radius = float(fits.radius_NK[n, best])
    return SeenObject(
        colour=colour,
        shape=SHAPES[best],
        size=min(RADII, key=lambda name: abs(RADII[name] - radius)),
        x=float(fits.x_NK[n, best]),
        y=float(fits.y_NK[n, best]),
        radius=radius,
        inside=float(fits.inside_NK[n, best]),
        colour_confidence=min(1.0, purity * 1.25) * min(1.0, 2 * fit),
        shape_confidence=fit * float(np.clip((first - second) / SURE_LEAD, 0, 1)),
    )


def _kept(objects: list[SeenObject]) -> tuple[SeenObject, ...]:
    kept = [o for o in objects if o.inside >= LEAST_INSIDE and o.colour_confidence > 0]
    return tuple(sorted(kept, key=lambda o: -o.radius))
