"""Every instrument says yes to a model that is right and no to one that is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echo_ray.engine.frames import pixels
from echo_ray.errors import ConfigError, EngineError, InvalidRequestError
from echo_ray.evaluation import (
    codec,
    consolidation,
    drift,
    following,
    motion,
    recall,
    speed,
    switching,
    wording,
)
from echo_ray.evaluation.cases import (
    SHAPE_NAMES,
    as_script,
    caption,
    draw_scene,
    return_caption,
)
from echo_ray.evaluation.instruments import INSTRUMENTS, chosen, run
from echo_ray.evaluation.report import Report, table
from echo_ray.evaluation.rollout import Plan, case_rng
from echo_ray.evaluation.statistics import Rate
from echo_ray.evaluation.variants import Variant
from echo_ray.scenes.captions import paraphrases
from echo_ray.session.chunk import Chunk

FEW = Plan(cases=2, seed=5, chunks=20)

With = Callable[..., Any]


@pytest.fixture
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recall after fewer times of hiding."""
    monkeypatch.setattr(recall, "WINDOWS", (1,))
    monkeypatch.setattr(recall, "PLAIN", (4, 7))
    monkeypatch.setattr(recall, "ABLATED", (4,))
    monkeypatch.setattr(recall, "OWN", (4,))


def rate(report: Report, group: str, name: str) -> float:
    found = report.figures[group][name]
    assert isinstance(found, Rate)
    assert found.cases > 0
    return found.value


@pytest.mark.parametrize("what", INSTRUMENTS)
def test_on_a_real_engine_each_writes_figures_cases_and_a_picture(
    what: str,
    small_subject: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    shorter: None,
) -> None:
    report, (data, image) = run(what, small_subject, Plan(cases=2, chunks=18), tmp_path, ["x"])
    assert (data.name, image.name) == (f"{what}.json", f"{what}.png")
    body = json.loads(data.read_text())
    assert body["figures"]
    assert body["model"]["fingerprint"] == small_subject.engine().fingerprint
    assert bool(body["cases"]) == (what != "external")
    assert len(table(report).splitlines()) > 3
    with Image.open(image) as opened:
        assert min(opened.size) > 200
    bar = capsys.readouterr().err
    assert (what in bar and "100%" in bar) == (what != "external")


def test_cases_depend_on_what_seed_and_index_alone() -> None:
    def drawn(what: str, seed: int, index: int) -> list[int]:
        return case_rng(what, seed, index).integers(10**6, size=4).tolist()

    assert drawn("recall", 1, 2) == drawn("recall", 1, 2)
    others = [drawn("recall", 1, 3), drawn("recall", 2, 2), drawn("drift", 1, 2)]
    assert drawn("recall", 1, 2) not in others


def test_following(oracle: Any, liar: Any) -> None:
    right, wrong = following.measure(oracle, FEW), following.measure(liar, FEW)
    for group, rows in right.figures.items():
        assert {n: rate(right, group, n) for n in rows} == dict.fromkeys(rows, 1.0)
    assert rate(wrong, "one object", "colour") == 0
    assert rate(wrong, "one object", "shape") == 1
    assert rate(wrong, "one object", "all of it") == 0
    assert rate(wrong, "two objects", "each colour with its shape") == 0
    assert rate(wrong, "all prompts", "background") == 1


def test_following_sees_what_is_missing_and_what_is_too_much(oracle_with: With) -> None:
    nothing = following.measure(oracle_with(lambda scene, age: scene.emptied), FEW)
    assert rate(nothing, "one object", "count") == 0
    assert rate(nothing, "one object", "colour") == 0
    assert rate(nothing, "empty scene", "nothing shown") == 1

    def fuller(scene: Any, age: int) -> Any:
        return scene if scene.things else replace(scene, things=(thing,))

    thing = draw_scene(case_rng("x", 0, 0), 1).things[0]
    assert rate(following.measure(oracle_with(fuller), FEW), "empty scene", "nothing shown") == 0


def test_switching(oracle: Any, liar: Any, oracle_with: With) -> None:
    quick = switching.measure(oracle, FEW)
    assert quick.figures["and shape"]["median"] == 1
    assert rate(quick, "and shape", "within 1 chunk") == 1
    never = switching.measure(liar, FEW)
    assert never.figures["colour and background"]["median"] == math.inf
    assert rate(never, "colour and background", "within 8 chunks") == 0

    def late(scene: Any, age: int) -> Any:
        return scene if age >= 2 else scene.emptied

    slow = switching.measure(oracle_with(late), FEW)
    assert slow.figures["colour and background"]["90th percentile"] == 3
    assert rate(slow, "colour and background", "within 2 chunks") == 0
    assert rate(slow, "colour and background", "within 4 chunks") == 1


@pytest.mark.parametrize(
    ("right", "chunks"),
    [("111", 1), ("0111", 2), ("11011101", 4), ("110110", math.inf), ("11", math.inf)],
)
def test_a_prompt_holds_from_the_first_of_three_right_chunks(right: str, chunks: float) -> None:
    assert switching.chunks_until([c == "1" for c in right]) == chunks


def test_recall(oracle_with: With, shorter: None) -> None:
    subject = oracle_with()
    subject.engines = lambda variant, points: oracle_with(
        remembers=variant is Variant.WHOLE
    ).engine()
    report = recall.measure(subject, Plan(cases=2, seed=3))
    whole, sink = Variant.WHOLE.value, Variant.SINK.value
    for hidden in (3, 4, 7):
        for what in ("colour", "shape", "size", "appeared"):
            assert rate(report, whole, f"{what}, {hidden} hidden") == 1
    assert rate(report, sink, "appeared, 4 hidden") == 1
    assert rate(report, sink, "colour, 4 hidden") < 1
    assert rate(report, recall.OWN_CLIP, "colour, 4 hidden") == 1
    gained = report.figures["points of colour above"][f"{sink}, 4 hidden"]
    assert isinstance(gained, float)
    assert gained >= 50


def test_recall_does_not_count_what_never_came_back(oracle_with: With, shorter: None) -> None:
    gone = oracle_with(lambda scene, age: scene.emptied)
    report = recall.measure(gone, Plan(cases=1))
    assert rate(report, Variant.WHOLE.value, "appeared, 4 hidden") == 0
    assert report.figures[Variant.WHOLE.value]["colour, 4 hidden"] == Rate(0, 0)
    assert recall.OWN_CLIP not in report.figures


def test_the_prompts_of_recall_do_not_say_the_answer() -> None:
    scene = draw_scene(case_rng("x", 0, 0), 1)
    prompts = recall.prompts_of(scene, 4, colour=False)
    assert sorted(prompts) == [0, 1, 3, 7]
    assert not any(scene.things[0].colour in text.split("on a")[0] for text in prompts.values())
    assert [bool(s.things) for s in recall.story(scene, 4)] == [False, True, True] + [False] * 4
    assert recall.story(scene, 4, in_sink=True)[0].things


def test_drift(oracle: Any, oracle_with: With, monkeypatch: pytest.MonkeyPatch) -> None:
    steady = drift.measure(oracle, FEW)
    for kind in drift.KINDS:
        assert rate(steady, kind, "prompt right, last tenth") == 1
        assert rate(steady, kind, "shape too, last tenth") == 1
        assert steady.figures[kind]["prompt right, last less first tenth, points"] == 0
        assert steady.figures[kind]["drift flags"] == 0
        assert steady.figures[kind]["chunks"] == 40
        # Two streams' tenths of two chunks each are one block a stream.
        assert steady.figures[kind]["prompt right, first tenth"] == Rate(4, 4, 2)

    def fading(scene: Any, age: int) -> Any:
        return scene.emptied if age > 12 else scene

    worn_subject = oracle_with(fading)
    engine = worn_subject.engine()
    monkeypatch.setattr(type(engine), "_flags", lambda self, state: ("frozen",) * (state.age > 13))
    worn = drift.measure(worn_subject, FEW)
    constant = worn.figures[drift.CONSTANT]
    assert constant["prompt right, last less first tenth, points"] == -100
    assert constant["prompt right, last less first tenth, points: to"] < 0  # type: ignore[operator]
    assert constant["flag frozen"] == constant["drift flags"] == 2 * 7
    assert constant["flag frozen, first at chunk"] == 13
    assert worn.cases[0]["flagged_chunks"] == list(range(13, 20))
    assert worn.cases[0]["flags"] == {"frozen": {"chunks": 7, "first": 13}}
    # A new prompt every ten chunks keeps its objects young.
    assert worn.figures[drift.SWITCHED]["drift flags"] == 0


def test_drift_sees_a_shape_that_gets_lost(oracle_with: With) -> None:
    def melting(scene: Any, age: int) -> Any:
        names = SHAPE_NAMES
        other = names[(names.index(scene.things[0].shape) + 1) % 3]
        things = (replace(scene.things[0], shape=other),)
        return replace(scene, things=things) if age > 12 else scene

    report = drift.measure(oracle_with(melting), replace(FEW, switched_streams=0))
    assert rate(report, drift.CONSTANT, "prompt right, last tenth") == 1
    assert rate(report, drift.CONSTANT, "shape too, last tenth") == 0
    assert drift.SWITCHED not in report.figures


def test_chunks_that_settle_after_a_switch_do_not_count(oracle_with: With) -> None:
    def late(scene: Any, age: int) -> Any:
        return scene.emptied if age < drift.SETTLED else scene

    report = drift.measure(oracle_with(late), replace(FEW, cases=1, constant_streams=0))
    # Blocks of two chunks; a switch at the tenth, which is nowhere in the seventh block's figure.
    assert report.cases[0]["right"]["prompt right"] == [
        (1.0, 0.0), (3.0, 0.5), (5.0, 1.0), (7.0, 1.0), (9.0, 1.0),
        (13.0, 1.0), (15.0, 1.0), (17.0, 1.0), (19.0, 1.0),
    ]  # fmt: skip


def test_drift_shows_what_it_has_so_far(oracle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "SHOW_EVERY", 18)
    partial: list[Report] = []
    plan = replace(FEW, constant_streams=1, switched_streams=2, so_far=partial.append)
    whole = drift.measure(oracle, plan)
    done = [sum(case["chunks"] for case in report.cases) for report in partial]
    assert done == [18, 36, 54]
    assert [{case["chunks"] for case in report.cases} for report in partial] == [{6}, {12}, {18}]
    assert "Unfinished: 36 of 60 chunks." in partial[1].notes
    assert not any("Unfinished" in note for note in whole.notes)
    assert [case["kind"] for case in whole.cases] == [drift.CONSTANT, *[drift.SWITCHED] * 2]
    assert rate(partial[0], drift.CONSTANT, "prompt right, first tenth") == 1


def test_streams_side_by_side_are_those_of_one_alone(small_subject: Any) -> None:
    plan = Plan(cases=2, chunks=12)
    both = drift.measure(small_subject, plan).cases
    alone = drift.measure(small_subject, replace(plan, cases=1, constant_streams=0)).cases
    assert alone[0] == both[2]


def test_ends_of_a_stream() -> None:
    assert [drift.block_of(n) for n in (1, 20, 400, 20_000)] == [1, 2, 40, 50]
    assert drift.stretches(10, 2) == {"tenth": 1}
    assert drift.stretches(39, 50) == {"tenth": 3}
    assert drift.stretches(400, 50) == {"tenth": 40, "1,000": 20}


def test_latents_are_measured_at_points_against_the_first_two(small_subject: Any) -> None:
    engine, distance = small_subject.engine(point_every=2), drift.LatentDistance()
    state = engine.open("a red ball", 1)
    found = []
    for _ in range(9):
        found.append(distance.at(engine, state))
        engine.step(state)
    assert [math.isnan(d) for d in found] == [n == 0 or n % 2 == 1 for n in range(9)]
    assert found[2] == 0
    assert all(d > 0 for d in found[4::2])


def test_curves_are_binned_without_what_is_missing() -> None:
    values = [1.0, 3.0, math.nan, 5.0, math.nan, math.nan, 8.0]
    assert drift.binned(values, 4) == [(1.0, 2.0), (3.0, 5.0), (7.0, 8.0)]
    assert drift.binned([1.0, 2.0], 4, 50) == [(25.0, 1.0), (75.0, 2.0)]


def test_consolidation(oracle: Any, oracle_with: With) -> None:
    equal = consolidation.measure(oracle, FEW)
    seam = "the chunk after the first point"
    assert equal.figures[seam]["worst, dB"] == consolidation.LOSSLESS_DB
    assert set(equal.figures["points lost or won"].values()) == {0.0}
    assert equal.figures["the largest loss"]["points lost or won"] == 0
    assert {len(case["prompt"].split(" and ")) for case in equal.cases} == {1, 2}
    assert len(equal.cases) == 2 * FEW.cases

    def from_the_point_on(scene: Any, age: int) -> Any:
        return scene.emptied if age >= 8 else scene

    oracles = {True: oracle_with(from_the_point_on).engine(), False: oracle_with().engine()}
    subject = oracle_with()
    subject.engines = lambda variant, points: oracles[points is None]
    worse = consolidation.measure(subject, FEW)
    worst = worse.figures[seam]["worst, dB"]
    assert isinstance(worst, float)
    assert worst < 25
    assert worse.figures["points lost or won"]["colour"] == -100
    assert worse.figures["points lost or won"]["background"] == 0
    loss = worse.figures["the largest loss"]
    assert loss["of"] == "count"
    assert loss["compared cases"] == 4
    assert loss["points lost or won"] == -100
    assert loss["points lost or won: to"] < 0  # type: ignore[operator]


def test_consolidation_refuses_what_cannot_be_compared(oracle: Any, oracle_with: With) -> None:
    oracle.preset = replace(oracle.preset, cache=replace(oracle.preset.cache, point_every=0))
    with pytest.raises(ConfigError, match="nothing to compare"):
        consolidation.measure(oracle, FEW)
    empty = oracle_with(lambda scene, age: scene.emptied)
    subject = oracle_with()
    subject.engines = lambda variant, points: (
        empty.engine() if points == 0 else oracle_with().engine()
    )
    with pytest.raises(EngineError, match="before the first point, at 8"):
        consolidation.measure(subject, FEW)


def test_motion(oracle: Any, oracle_with: With, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(cases=4, seed=1)
    right = motion.measure(oracle, plan)
    assert rate(right, "speed word followed", "both") == 1
    assert rate(right, "speed word followed", "by the true clips") == 1
    gap = right.figures["speed"]["distance"]
    assert isinstance(gap, float)
    assert gap < 0.2
    assert rate(right, "frames with exactly one object", motion.MADE) > 0.95

    subject = oracle_with()
    engine = subject.engine()
    step = type(engine).step

    def still(self: Any, state: Any, prompts: Any = ()) -> Chunk:
        chunk = step(self, state, prompts)
        first = pixels(chunk)[:1].tobytes()
        return replace(chunk, frames=first * chunk.num_frames)

    monkeypatch.setattr(type(engine), "step", still)
    wrong = motion.measure(subject, plan)
    assert rate(wrong, "speed word followed", "quickly") == 0
    gap = wrong.figures["speed"]["distance"]
    assert isinstance(gap, float)
    assert gap > 0.6


def test_bounces_and_gaps_of_a_track() -> None:
    forth = [(float(n), 5.0) for n in range(12)]
    track: motion.Track = [*forth, *[(float(n), 5.0) for n in range(10, -1, -1)]]
    (whole,) = motion.runs(track)
    velocity = (whole[3:] - whole[:-3]) / 3
    assert motion.bounces(velocity) == 1
    assert [len(run) for run in motion.runs([*forth, None, *forth[:3], None, *forth])] == [12, 12]
    assert motion.nearest_speed(0.9) == "slowly"
    assert motion.nearest_speed(2.9) == "quickly"
    assert motion.nearest_speed(math.nan) is None


def test_wording(oracle: Any, oracle_with: With) -> None:
    right = wording.measure(oracle, FEW)
    for name in wording.WORDINGS:
        assert rate(right, name, "all of it") == 1
    assert right.figures["template"]["words understood"] == 1.0
    understood = right.figures["filler"]["words understood"]
    assert isinstance(understood, float)
    assert understood < 0.7
    plain = wording.measure(oracle_with(knows_synonyms=False), FEW)
    assert rate(plain, "template", "colour") == 1
    lost = plain.figures["points below the template"]["synonym, colour"]
    assert isinstance(lost, float)
    assert lost > 30


def test_prompts_of_cases_are_those_of_the_worlds_grammar() -> None:
    rng = np.random.default_rng(0)
    for index in range(12):
        scene = draw_scene(case_rng("following", 0, index), 1)
        full = caption(scene, size=True, speed=True)
        assert full == paraphrases(rng, as_script([scene]), 0)["template"]
        thing = scene.things[0]
        behind = f"on a {scene.background} background"
        assert full == f"a {thing.size} {thing.colour} {thing.shape} moving {thing.speed} {behind}"
        assert caption(scene) == f"a {thing.colour} {thing.shape} {behind}"
        assert caption(scene, colour=False) == f"a {thing.shape} {behind}"
        assert return_caption(scene) == f"it comes back {behind}"
        assert caption(scene.emptied, speed=True) == f"an empty {scene.background} background"
        two = draw_scene(case_rng("following", 0, index), 2)
        first, second = (f"a {t.size} {t.colour} {t.shape}" for t in two.things)
        behind = f"on a {two.background} background"
        assert caption(two, size=True) == f"{first} and {second} {behind}"


def test_speed_counts_every_second_once(oracle: Any) -> None:
    report = speed.measure(oracle, Plan(cases=2))
    rates, stages = report.figures["frames a second"], report.figures["milliseconds a chunk"]
    assert rates["engine"] > rates["with MP4 encoding"] > 0  # type: ignore[operator]
    assert stages["denoise"] == pytest.approx(4.0)
    assert stages["decode"] == pytest.approx(1.0)
    assert len(report.cases) == 2
    assert len(report.cases[0]["step_ms"]) == speed.CHUNKS


def test_codec(oracle: Any, oracle_with: With) -> None:
    right = codec.measure(oracle, FEW)
    assert right.figures["PSNR, dB"]["of the mean error"] == math.inf
    for kind in (codec.TRUE, codec.ROUND_TRIP):
        assert rate(right, kind, "colour") == 1
        assert rate(right, kind, "shape") > 0.97

    class Blind(type(oracle.engine())):  # type: ignore[misc]
        def step(self, state: Any, prompts: Any = ()) -> Chunk:
            state.clip = b""
            return super().step(state, prompts)  # type: ignore[no-any-return]

    subject = oracle_with()
    subject.engines = lambda variant, points: Blind(lambda scene, age: scene.emptied)
    wrong = codec.measure(subject, FEW)
    assert rate(wrong, codec.TRUE, "colour") == 1
    assert rate(wrong, codec.ROUND_TRIP, "colour") == 0
    assert rate(wrong, codec.ROUND_TRIP, "background") == 1
    assert wrong.figures["PSNR, dB"]["of the mean error"] < 25  # type: ignore[operator]
    assert right.figures["cost"]["decode, ms a frame"] == pytest.approx(4 / 45)


def test_names_are_refused_with_the_nearest_one() -> None:
    assert chosen("recall") == ["recall"]
    assert chosen("all") == [n for n in INSTRUMENTS if n != "external"]
    with pytest.raises(InvalidRequestError, match="did you mean recall"):
        chosen("recal")
    with pytest.raises(InvalidRequestError, match="known: following, switching"):
        chosen("zzz")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"cases": 0}, "--cases 0: give 1"),
        ({"cases": 1, "chunks": 0}, "--chunks 0: give 1"),
        ({"cases": 1, "seed": -1}, "--seed -1: give 0"),
        ({"cases": 1, "constant_streams": -1}, "--constant-streams -1: give 0"),
        ({"cases": 1, "switched_streams": 10**7}, "--switched-streams 10000000: give 0"),
        ({"cases": 1, "constant_streams": 0, "switched_streams": 0}, "at least one stream"),
    ],
)
def test_plans_are_refused(values: dict[str, int], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        Plan(**values)
