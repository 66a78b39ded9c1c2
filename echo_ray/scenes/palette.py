"""Names pixels after the palette, and takes them apart into the colours that they mix.

Shapes: T frames, H W pixels, X = H * W, C palette colours, E colours of one frame, background
first, K = E - 1 object colours.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from echo_ray.scenes.world import BACKGROUND_RGB, COLOUR_RGB, Floats, Ints

PALETTE_RGB: Floats = np.concatenate([BACKGROUND_RGB, COLOUR_RGB])
"""Backgrounds, then the colours of objects."""
NEAR = 0.3
"""Distance in RGB up to which a pixel has a palette colour; beyond it is of no known colour."""
FAITHFUL, FOREIGN = 0.2, 0.4
"""Distances from a mixture up to which a pixel counts in full, and from which on not at all."""
SOFT = 0.15
"""Share of a colour below which a pixel has none of it, and above one less that, all."""
PREFER_BACKGROUND = 0.002
"""Squared distance by which a mix of two objects must be better than one with the background."""


@dataclass(frozen=True)
class Named:
    """Pixels by palette colour."""

    label_THW: NDArray[np.int8]
    """Index into PALETTE_RGB, -1 for no known colour."""
    count_TC: Ints


def name_pixels(rgb_T3HW: Floats) -> Named:
    """The nearest palette colour of each pixel, and how many pixels each colour has."""
    total, _, height, width = rgb_T3HW.shape
    flat_T3X = rgb_T3HW.reshape(total, 3, -1)
    # Squared distance, less the pixel's own square, which is the same for every colour.
    away_TCX = (PALETTE_RGB**2).sum(axis=1)[:, None] - 2 * (PALETTE_RGB @ flat_T3X)
    label_TX = away_TCX.argmin(axis=1).astype(np.int8)
    square_TX = away_TCX.min(axis=1) + (flat_T3X**2).sum(axis=1)
    label_TX[square_TX > NEAR**2] = -1
    colours = len(PALETTE_RGB)
    count_TC = [np.bincount(row + 1, minlength=colours + 1)[1:] for row in label_TX]
    return Named(label_TX.reshape(total, height, width), np.stack(count_TC))


def unmix(rgb_T3HW: Floats, present_TE3: Floats) -> Floats:
    """The share [T, K, H, W] that each object colour has in each pixel.

    A pixel is a mixture of the two colours whose straight line it is nearest to; far from every
    line it belongs to nothing.
    """
    total, _, height, width = rgb_T3HW.shape
    flat_T3X = rgb_T3HW.reshape(total, 3, -1)
    dot_TEX = present_TE3 @ flat_T3X
    gram_TEE = present_TE3 @ present_TE3.swapaxes(1, 2)
    square_TX = (flat_T3X**2).sum(axis=1)
    objects = present_TE3.shape[1] - 1
    share_TKX = np.zeros((total, objects, flat_T3X.shape[2]), dtype=np.float32)
    least_TX = np.full_like(square_TX, np.inf)
    for a, b in combinations(range(objects + 1), 2):
        aa, ab, bb = (gram_TEE[:, i, j, None] for i, j in ((a, a), (a, b), (b, b)))
        length = aa - 2 * ab + bb
        along = dot_TEX[:, b] - dot_TEX[:, a] - ab + aa
        part = np.clip(along / length, 0, 1)
        away = square_TX - 2 * dot_TEX[:, a] + aa - 2 * part * along + part * part * length
        better = away + (PREFER_BACKGROUND if a else 0) < least_TX
        least_TX = np.where(better, away, least_TX)
        for k in range(objects):
            mine = part if k == b - 1 else 1 - part if k == a - 1 else 0
            share_TKX[:, k] = np.where(better, mine, share_TKX[:, k])
    distance_TX = np.sqrt(np.maximum(least_TX, 0))
    faith_TX = np.clip((FOREIGN - distance_TX) / (FOREIGN - FAITHFUL), 0, 1)
    share_TKX = np.clip((share_TKX - SOFT) / (1 - 2 * SOFT), 0, 1) * faith_TX[:, None]
    return np.asarray(share_TKX.reshape(total, objects, height, width), dtype=np.float32)
