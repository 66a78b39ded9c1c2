"""Scenes are read back from their frames, and what cannot be told is not said for sure."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from echo_ray.errors import ConfigError
from echo_ray.scenes.detector import Seen, SeenObject, detect
from echo_ray.scenes.world import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOURS,
    RADII,
    SHAPES,
    Bools,
    Floats,
    Frames,
    render,
)

SIZE = 64
RADIUS = np.array(list(RADII.values()), dtype=np.float32)
COLOUR_NAMES, BACKGROUND_NAMES, SIZE_NAMES = tuple(COLOURS), tuple(BACKGROUNDS), tuple(RADII)


def random_scenes(seed: int, count: int, objects: tuple[int, ...] = (1, 2)) -> Frames:
    rng = np.random.default_rng(seed)
    radius = rng.choice(RADIUS, (count, 2))
    return Frames(
        background_T=rng.integers(len(BACKGROUNDS), size=count),
        x_TO=rng.uniform(radius, SIZE - radius).astype(np.float32),
        y_TO=rng.uniform(radius, SIZE - radius).astype(np.float32),
        radius_TO=radius,
        colour_TO=np.stack([rng.permutation(len(COLOURS))[:2] for _ in range(count)]),
        shape_TO=rng.integers(len(SHAPES), size=(count, 2)),
        visible_TO=np.arange(2) < rng.choice(objects, count)[:, None],
    )


def covered_share(frames: Frames) -> Floats:
    """How much of the smaller object of each frame the two share."""
    alone = []
    for o in range(2):
        visible = np.zeros_like(frames.visible_TO)
        visible[:, o] = frames.visible_TO[:, o]
        alone.append(render(replace(frames, visible_TO=visible), SIZE, SIZE)[1])
    smaller = np.minimum(alone[0].sum(axis=(1, 2)), alone[1].sum(axis=(1, 2)))
    share = np.minimum(*alone).sum(axis=(1, 2)) / np.maximum(smaller, 1)
    return np.asarray(share, dtype=np.float32)


@dataclass
class Tally:
    background: float
    count: float
    colour: float
    shape: float
    size: float
    errors: list[float]
    """Distances between true and seen centres."""
    answers: list[tuple[SeenObject, bool]]
    """Objects of a true colour, and whether their shape is the true one."""


def tally(frames: Frames, seen: list[Seen], among: Bools) -> Tally:
    hits = {"background": 0, "count": 0, "colour": 0, "shape": 0, "size": 0}
    errors, answers, objects = [], [], 0
    for t in np.flatnonzero(among):
        true = np.flatnonzero(frames.visible_TO[t])
        hits["background"] += seen[t].background == BACKGROUND_NAMES[frames.background_T[t]]
        hits["count"] += len(seen[t].objects) == len(true)
        found = {o.colour: o for o in seen[t].objects}
        objects += len(true)
        for o in true:
            got = found.get(COLOUR_NAMES[frames.colour_TO[t, o]])
            if got is None:
                continue
            right = got.shape == SHAPES[frames.shape_TO[t, o]]
            hits["colour"] += 1
            hits["shape"] += right
            hits["size"] += RADII[got.size] == frames.radius_TO[t, o]
            errors.append(float(np.hypot(got.x - frames.x_TO[t, o], got.y - frames.y_TO[t, o])))
            answers.append((got, right))
    of = {"background": among.sum(), "count": among.sum()}
    shares = {name: float(n / of.get(name, objects)) for name, n in hits.items()}
    return Tally(**shares, errors=errors, answers=answers)


def blurred(picture: Floats, sigma: float) -> Floats:
    """A Gaussian blur, edges repeated."""
    reach = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (2, 3):
        pads = [(0, 0)] * 4
        pads[axis] = (reach, reach)
        padded = np.pad(picture, pads, mode="edge")
        picture = sum(
            share * np.take(padded, np.arange(i, i + SIZE), axis=axis)
            for i, share in enumerate(kernel)
        )
    return np.asarray(picture, dtype=np.float32)


def test_true_frames_are_read_without_error() -> None:
    frames = random_scenes(11, 1200)
    among = covered_share(frames) <= 0.4
    assert 1000 < among.sum() < 1190, "some overlap too much, most do not"
    result = tally(frames, detect(render(frames, SIZE, SIZE)[0]), among)
    for name in ("background", "count", "colour", "shape", "size"):
        assert getattr(result, name) >= 0.99, name
    assert np.mean(result.errors) < 0.2
    assert np.quantile(result.errors, 0.995) < 1.0
    assert np.mean([o.confidence for o, _ in result.answers]) > 0.95


def test_bytes_are_read_like_floats() -> None:
    frames = random_scenes(12, 40)
    picture = render(frames, SIZE, SIZE)[0]
    as_bytes = (picture * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    for a, b in zip(detect(picture), detect(as_bytes), strict=True):
        assert a.background == b.background
        assert [(o.colour, o.shape, o.size) for o in a.objects] == [
            (o.colour, o.shape, o.size) for o in b.objects
        ]


def test_a_frame_is_read_alike_alone_and_among_others() -> None:
    picture = render(random_scenes(13, 40), SIZE, SIZE)[0]
    together = detect(picture)
    for t in (0, 17, 39):
        (alone,) = detect(picture[t : t + 1])
        assert alone.background == together[t].background
        assert [o.colour for o in alone.objects] == [o.colour for o in together[t].objects]
        for a, b in zip(alone.objects, together[t].objects, strict=True):
            assert (a.x, a.y, a.radius) == pytest.approx((b.x, b.y, b.radius), abs=0.02)


def test_empty_frames_hold_nothing() -> None:
    pictures = np.broadcast_to(BACKGROUND_RGB[:, :, None, None], (4, 3, SIZE, SIZE))
    for name, seen in zip(BACKGROUND_NAMES, detect(pictures), strict=True):
        assert seen.background == name
        assert seen.background_confidence == 1
        assert seen.objects == ()
        assert seen.unexplained == 0


def test_touching_objects_are_two() -> None:
    frames = random_scenes(14, 400, objects=(2,))
    share = covered_share(frames)
    among = (share > 0.02) & (share <= 0.4)
    assert among.sum() > 80
    result = tally(frames, detect(render(frames, SIZE, SIZE)[0]), among)
    assert result.count >= 0.99
    assert result.shape >= 0.98


def at_the_border(seed: int, count: int) -> tuple[Frames, Floats]:
    """One object each, cut off by the left or the upper border; and the share inside."""
    frames = random_scenes(seed, count, objects=(1,))
    rng = np.random.default_rng(seed)
    left = rng.random(count) < 0.5
    depth = rng.uniform(-1.1, 0.9, count).astype(np.float32) * frames.radius_TO[:, 0]
    x, y = frames.x_TO.copy(), frames.y_TO.copy()
    x[left, 0], y[~left, 0] = depth[left], depth[~left]
    frames = replace(frames, x_TO=x, y_TO=y)
    aside = replace(frames, x_TO=x + SIZE // 2, y_TO=y + SIZE // 2)
    inside = render(frames, SIZE, SIZE)[1].sum(axis=(1, 2))
    whole = render(aside, 2 * SIZE, 2 * SIZE)[1].sum(axis=(1, 2))
    return frames, np.asarray(inside / whole, dtype=np.float32)


def test_an_object_counts_while_half_of_it_is_inside() -> None:
    frames, inside = at_the_border(15, 500)
    seen = detect(render(frames, SIZE, SIZE)[0])
    result = tally(frames, seen, inside > 0.55)
    assert result.count >= 0.99
    assert result.shape >= 0.99
    assert result.size >= 0.98
    shares = [s.objects[0].inside for s in np.array(seen, dtype=object)[inside > 0.7]]
    assert np.abs(np.array(shares) - inside[inside > 0.7]).mean() < 0.05
    mostly_out = [len(s.objects) for s in np.array(seen, dtype=object)[inside < 0.35]]
    assert len(mostly_out) > 50
    assert np.mean(mostly_out) < 0.15


@pytest.mark.parametrize("sigma", [2.0, 3.0, 4.0])
def test_blur_costs_confidence_before_it_costs_truth(sigma: float) -> None:
    frames = random_scenes(16, 200)
    among = covered_share(frames) <= 0.4
    result = tally(frames, detect(blurred(render(frames, SIZE, SIZE)[0], sigma)), among)
    sure = [right for o, right in result.answers if o.shape_confidence > 0.5]
    assert np.mean(sure) >= 0.97
    mean = np.mean([o.shape_confidence for o, _ in result.answers])
    assert mean < {2.0: 0.97, 3.0: 0.8, 4.0: 0.5}[sigma]
    assert result.background == 1


def test_noise_costs_confidence_before_it_costs_truth() -> None:
    frames = random_scenes(17, 200)
    among = covered_share(frames) <= 0.4
    picture = render(frames, SIZE, SIZE)[0]
    noise = np.random.default_rng(0).normal(0, 1, picture.shape)
    for level, least in ((0.1, 0.99), (0.2, 0.8)):
        noisy = np.clip(picture + level * noise, 0, 1).astype(np.float32)
        result = tally(frames, detect(noisy), among)
        assert result.colour >= least
        sure = [right for o, right in result.answers if o.shape_confidence > 0.5]
        assert np.mean(sure) >= 0.99


def test_noise_alone_is_no_object() -> None:
    noise = np.random.default_rng(1).random((20, 3, SIZE, SIZE)).astype(np.float32)
    seen = detect(noise)
    assert not any(o.confidence > 0.1 for s in seen for o in s.objects)
    assert np.mean([s.background_confidence for s in seen]) < 0.3
    assert np.mean([s.unexplained for s in seen]) > 0.5


def test_a_patch_of_no_known_shape_is_no_sure_answer() -> None:
    frames = random_scenes(18, 60, objects=(1,))
    picture = render(frames, SIZE, SIZE)[0]
    stripes = np.where(np.arange(SIZE) % 6 < 3, 1, 0)[:, None]
    behind = BACKGROUND_RGB[frames.background_T][:, :, None, None]
    seen = detect(np.where(stripes, picture, behind).astype(np.float32))
    assert np.mean([o.confidence for s in seen for o in s.objects]) < 0.3


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((3, 64, 64), dtype=np.float32),
        np.zeros((2, 64, 64, 3), dtype=np.float32),
        np.zeros((2, 3, 64, 64), dtype=np.uint8),
    ],
)
def test_frames_of_another_layout_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=r"frames: .* of shape .*; give \[T"):
        detect(pixels)
