"""Every kind of clip shows what its script and its name say."""

from __future__ import annotations

import numpy as np
import pytest

from echo_ray.errors import ConfigError
from echo_ray.scenes.clips import Clip, make_clip
from echo_ray.scenes.detector import detect
from echo_ray.scenes.scripts import KINDS, LEAST_CHUNKS, chunk_of_frames, with_share, write_script
from echo_ray.scenes.world import COLOURS, RADII, SPEEDS, Bools, Floats, render

CHUNKS, FIRST, LATER, SIZE = 10, 9, 12, 64
CHUNK_T = chunk_of_frames(CHUNKS, FIRST, LATER)


def clips(kind: str, count: int = 25) -> list[Clip]:
    return [
        make_clip(np.random.default_rng([seed, 77]), CHUNKS, SIZE, FIRST, LATER, kind)
        for seed in range(count)
    ]


def drawn(clip: Clip) -> Floats:
    """Covered area of each frame [T]."""
    return np.asarray(render(clip.frames, SIZE, SIZE)[1].sum(axis=(1, 2)))


def distance(clip: Clip) -> Floats:
    f = clip.frames
    return np.asarray(np.hypot(f.x_TO[:, 0] - f.x_TO[:, 1], f.y_TO[:, 0] - f.y_TO[:, 1]))


def runs(hidden_K: Bools) -> list[tuple[int, int]]:
    """Start and length of each run of hidden chunks."""
    edges = np.diff(np.concatenate([[0], hidden_K.astype(int), [0]]))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return [(int(a), int(b - a)) for a, b in zip(starts, ends, strict=True)]


def test_frames_belong_to_chunks() -> None:
    assert chunk_of_frames(3, 9, 12).tolist() == [0] * 9 + [1] * 12 + [2] * 12


def test_the_same_seed_gives_the_same_clip() -> None:
    for kind in KINDS:
        a, b = clips(kind, 2), clips(kind, 2)
        assert [c.captions for c in a] == [c.captions for c in b]
        assert all(np.array_equal(x.frames.x_TO, y.frames.x_TO) for x, y in zip(a, b, strict=True))


def test_kinds_come_by_their_shares() -> None:
    rng = np.random.default_rng(1)
    drawn_kinds = [write_script(rng, CHUNKS).kind for _ in range(1500)]
    assert sum(KINDS.values()) == pytest.approx(1)
    for kind, share in KINDS.items():
        assert drawn_kinds.count(kind) / 1500 == pytest.approx(share, abs=0.04)


def test_one_kind_can_be_given_a_share_of_its_own() -> None:
    rng = np.random.default_rng(2)
    shares = with_share("hide", 0.6)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["switch"] / shares["steady"] == pytest.approx(KINDS["switch"] / KINDS["steady"])
    drawn_kinds = [write_script(rng, CHUNKS, shares=shares).kind for _ in range(1500)]
    for kind, share in shares.items():
        assert drawn_kinds.count(kind) / 1500 == pytest.approx(share, abs=0.04)
    alone = [write_script(rng, CHUNKS, shares=with_share("hide", 1.0)).kind for _ in range(20)]
    assert set(alone) == {"hide"}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_two_objects_can_be_given_a_share_where_the_kind_leaves_it_open(share: float) -> None:
    rng = np.random.default_rng(3)
    scripts = [write_script(rng, CHUNKS, two_objects=share) for _ in range(300)]
    free = [s.colour_KO.shape[1] for s in scripts if s.kind in ("steady", "switch")]
    assert set(free) == {1 + int(share)}
    assert {s.colour_KO.shape[1] for s in scripts if s.kind == "hide"} == {1}
    assert {s.colour_KO.shape[1] for s in scripts if s.kind == "cross"} == {2}


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 5, 6, 17])
def test_clips_of_any_length_are_written(chunks: int) -> None:
    for seed in range(60):
        clip = make_clip(np.random.default_rng(seed), chunks, SIZE, FIRST, LATER)
        assert len(clip.captions) == chunks
        assert len(clip.frames.background_T) == FIRST + LATER * (chunks - 1)
        assert chunks >= LEAST_CHUNKS.get(clip.script.kind, 1)


def test_unknown_kinds_and_too_short_clips_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match="kind 'explode': unknown; one of steady, switch"):
        write_script(rng, 10, "explode")
    with pytest.raises(ConfigError, match="kind 'hide': needs 4 chunks or more, not 3"):
        write_script(rng, 3, "hide")


@pytest.mark.parametrize("kind", list(KINDS))
def test_scripts_tell_what_is_drawn(kind: str) -> None:
    for clip in clips(kind):
        area = drawn(clip)
        shown = np.array([area[k == CHUNK_T].max() > 0.5 for k in range(CHUNKS)])
        assert (shown == ~clip.script.hidden_K).all()
        colours = clip.script.colour_KO
        assert all(len(set(row)) == len(row) for row in colours.tolist())


def test_steady_clips_never_change() -> None:
    for clip in clips("steady"):
        s = clip.script
        assert s.visible_KO.all()
        for values in (s.background_K, s.colour_KO, s.shape_KO):
            assert (values == values[0]).all()


def test_switches_change_something_at_chunk_borders() -> None:
    changed = {"background": 0, "colour": 0, "shape": 0}
    for clip in clips("switch", 40):
        s = clip.script
        what = {
            "background": (s.background_K != s.background_K[0]).any(),
            "colour": (s.colour_KO != s.colour_KO[0]).any(),
            "shape": (s.shape_KO != s.shape_KO[0]).any(),
        }
        # Two switches may undo each other, which is rare; one is always there.
        steps = sum((np.diff(v, axis=0) != 0).any() for v in (s.background_K, s.colour_KO))
        assert steps or (np.diff(s.shape_KO, axis=0) != 0).any()
        for name, yes in what.items():
            changed[name] += bool(yes)
    assert min(changed.values()) > 8


def test_objects_are_added_and_removed_for_good() -> None:
    later_gone = 0
    for clip in clips("add", 40):
        first, second = clip.script.visible_KO.T
        assert first[0]
        assert not second[0]
        assert second[-1]
        assert (np.diff(second.astype(int)) >= 0).all()
        later_gone += not first[-1]
    assert 0 < later_gone < 25
    for clip in clips("remove", 40):
        visible = clip.script.visible_KO
        assert visible[0].all()
        assert not visible[-1].all()
        assert (np.diff(visible.astype(int), axis=0) <= 0).all()


def test_two_tracks_meet_in_the_middle_of_a_crossing_and_nowhere_else_so_surely() -> None:
    for clip in clips("cross"):
        apart = distance(clip)
        total = len(apart)
        assert apart[total // 6 : -total // 6].min() < 6
    free = [distance(c).min() for c in clips("steady", 60) if c.script.colour_KO.shape[1] == 2]
    assert np.median(free) > 8


def test_hidden_objects_come_back_where_their_motion_has_brought_them() -> None:
    lengths = []
    for clip in clips("hide", 60):
        s, f = clip.script, clip.frames
        assert s.visible_KO.shape[1] == 1
        assert s.visible_KO[-1, 0]
        seen_from = int(np.flatnonzero(s.visible_KO[:, 0])[0])
        assert seen_from <= 1
        (gap,) = (run for run in runs(s.hidden_K) if run[0] > seen_from)
        lengths.append(gap[1])
        # Constant speed throughout, but for the few frames in which it bounces.
        steps = np.hypot(np.diff(f.x_TO[:, 0]), np.diff(f.y_TO[:, 0]))
        speed = list(SPEEDS.values())[s.speed_O[0]]
        assert np.median(steps) == pytest.approx(speed, abs=1e-3)
        assert steps.max() < speed + 1e-3
    assert min(lengths) == 3, "as long as the local window, or longer"
    assert max(lengths) >= 6


def test_long_clips_hide_for_up_to_twelve_chunks() -> None:
    lengths = []
    for seed in range(80):
        script = write_script(np.random.default_rng(seed), 24, "hide")
        lengths.append(max(length for _, length in runs(script.hidden_K)))
    assert max(lengths) == 12


def test_objects_leave_and_enter_through_the_border() -> None:
    left = entered = 0
    for clip in clips("border", 60):
        s, f = clip.script, clip.frames
        area = drawn(clip)
        assert s.border_KO.any()
        assert not (s.border_KO & ~s.visible_KO).any()
        r = f.radius_TO[:, 0]
        depth = np.minimum.reduce(
            [f.x_TO[:, 0], SIZE - f.x_TO[:, 0], f.y_TO[:, 0], SIZE - f.y_TO[:, 0]]
        )
        for k in range(CHUNKS):
            frames = k == CHUNK_T
            if not s.border_KO[k, 0] and s.visible_KO[k, 0]:
                assert (depth[frames] > r[frames] - 0.11).all(), "wholly inside"
        # It never jumps, and it is seldom cut off for more than its two ways through.
        steps = np.hypot(np.diff(f.x_TO[:, 0]), np.diff(f.y_TO[:, 0]))
        assert steps.max() < SPEEDS["quickly"] + 1e-3
        crossing = 2 if r[0] == RADII["big"] else 1
        assert s.border_KO.sum() <= 2 * crossing
        gone = np.flatnonzero(area == 0)
        if gone.size:
            left += bool(area[: gone[0]].any())
            entered += bool(area[gone[-1] :].any())
    assert left > 15
    assert entered > 15


def test_empty_clips_show_a_background_that_may_change() -> None:
    changes = 0
    for clip in clips("empty"):
        assert drawn(clip).max() == 0
        changes += (clip.script.background_K != clip.script.background_K[0]).any()
    assert 4 < changes < 21


@pytest.mark.parametrize("kind", ["steady", "switch", "remove", "hide", "border"])
def test_the_detector_reads_clips_as_their_scripts_say(kind: str) -> None:
    right = total = 0
    for clip in clips(kind, 4):
        every = np.flatnonzero(CHUNK_T > 0)[5::12]
        seen = detect(render(clip.frames, SIZE, SIZE)[0][every])
        s = clip.script
        for t, frame in zip(every, seen, strict=True):
            k = CHUNK_T[t]
            if s.border_KO[k].any():
                continue
            names = {list(COLOURS)[c] for c in s.colour_KO[k][s.visible_KO[k]]}
            total += 1
            right += {o.colour for o in frame.objects} == names
    assert total > 25
    assert right / total > 0.9, "the rest is hidden behind the other object"
