"""The promise at its root: load, replay and step is bit-identical to never having stopped."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
from small import small_clip, small_engine

from echo_ray.engine.engine import EchoEngine
from echo_ray.engine.state import SessionState
from echo_ray.errors import EngineError, SnapshotCorrupt, SnapshotForeign
from echo_ray.session.snapshot import Buffer, decode, encode

CHUNKS = 14
SWITCHES = {2: ("a blue square",), 9: ("two green balls", "a red triangle")}
"""The early switch comes before the window is full, the late one in the mature phase."""


def undisturbed(
    engine: EchoEngine, seed: int = 5, clip: bytes = b""
) -> tuple[list[str], dict[int, bytes]]:
    """Digests of a run that never stops, and the snapshots of all its points."""
    state = engine.open("a red ball", seed, clip)
    digests, points = [], {0: encode(engine.save(state))}
    for index in range(CHUNKS):
        digests.append(engine.step(state, SWITCHES.get(index, ())).digest)
        if state.at_point:
            points[state.next_index] = encode(engine.save(state))
    return digests, points


def resumed(engine: EchoEngine, blob: bytes) -> tuple[int, list[str]]:
    state = engine.load(decode(blob))
    first = state.next_index
    return first, [engine.step(state, SWITCHES.get(i, ())).digest for i in range(first, CHUNKS)]


@pytest.mark.parametrize("every", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("recache", [True, False])
@pytest.mark.parametrize("global_sink", [True, False])
def test_resume_from_every_point_is_bit_identical(
    every: int, recache: bool, global_sink: bool
) -> None:
    cache = {"point_every": every, "recache": recache, "global_sink": global_sink}
    digests, points = undisturbed(small_engine(**cache))
    assert len(set(digests)) == CHUNKS
    assert set(points) == set(range(0, CHUNKS + 1, every))
    for point, blob in points.items():
        first, replayed = resumed(small_engine(**cache), blob)
        assert first == point
        assert replayed == digests[point:], f"resume from point {point} differs"


@pytest.mark.parametrize("policy", ["absolute", "window"])
def test_resume_holds_for_every_cache_policy(policy: str) -> None:
    digests, points = undisturbed(small_engine(policy=policy, point_every=3))
    for point, blob in points.items():
        assert resumed(small_engine(policy=policy, point_every=3), blob)[1] == digests[point:]


@pytest.mark.parametrize(("codec", "every"), [("wan", 7), ("tiny", 3)])
def test_resume_holds_for_every_codec(codec: str, every: int) -> None:
    """The stream grows older than what any decoder remembers: the rebuilt one is the live one."""
    digests, points = undisturbed(small_engine(codec=codec, point_every=every))
    assert len(set(digests)) == CHUNKS
    for point, blob in points.items():
        engine = small_engine(codec=codec, point_every=every)
        assert resumed(engine, blob)[1] == digests[point:], f"resume from point {point} differs"


@pytest.mark.parametrize(("codec", "every"), [("wan", 7), ("group", 3)])
def test_resume_holds_while_a_given_clip_is_played(codec: str, every: int) -> None:
    """Eleven chunks of clip: points before, inside and after it, eviction and switches within."""
    clip = small_clip(codec, 9 + 12 * 10)
    digests, points = undisturbed(small_engine(codec=codec, point_every=every), clip=clip)
    assert len(set(digests)) == CHUNKS
    for point, blob in points.items():
        assert resumed(small_engine(codec=codec, point_every=every), blob)[1] == digests[point:]


def test_a_second_interruption_changes_nothing() -> None:
    engine = small_engine(point_every=2)
    digests, points = undisturbed(engine)
    state = engine.load(decode(points[4]))
    for index in range(4, 8):
        engine.step(state, SWITCHES.get(index, ()))
    blob = encode(engine.save(state))
    assert blob == points[8]
    assert resumed(engine, blob)[1] == digests[8:]


def test_interleaved_sessions_do_not_touch_each_other() -> None:
    engine = small_engine(point_every=3)
    alone = {seed: undisturbed(engine, seed)[0] for seed in (1, 2, 3)}
    states = {seed: engine.open("a red ball", seed) for seed in alone}
    mixed: dict[int, list[str]] = {seed: [] for seed in alone}
    for index in range(CHUNKS):
        for seed in sorted(states, key=lambda s: (s * (index + 3)) % 5):
            mixed[seed].append(engine.step(states[seed], SWITCHES.get(index, ())).digest)
    assert mixed == alone
    assert len({d for digests in alone.values() for d in digests}) == 3 * CHUNKS


def test_consolidation_is_part_of_the_machine() -> None:
    often = undisturbed(small_engine(point_every=2))[0]
    never = undisturbed(small_engine(point_every=0))[0]
    # Consolidating the sink alone changes nothing; from the first full rebuild on it does.
    assert often[0] == never[0]
    assert often != never


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_snapshot_size_does_not_depend_on_age() -> None:
    engine = small_engine(point_every=8, steps=(1000,))
    state = engine.open("a red ball", 11)
    sizes = {}
    while state.next_index < 2000:
        engine.step(state)
        if state.next_index in (24, 2000):
            sizes[state.next_index] = len(encode(engine.save(state)))
    assert sizes[24] == sizes[2000]


def test_saving_between_points_is_refused() -> None:
    engine = small_engine(point_every=3)
    state = engine.open("a red ball", 1)
    engine.step(state)
    with pytest.raises(EngineError, match="not a point; points are multiples of 3"):
        engine.save(state)


def point_six() -> tuple[EchoEngine, SessionState]:
    engine = small_engine(point_every=6)
    state = engine.open("a red ball", 1)
    for _ in range(6):
        engine.step(state)
    return engine, state


@pytest.mark.parametrize(
    "name",
    [
        "counters",
        "drift",
        "given",
        "history",
        "memory_query",
        "prompt_rows",
        "sink",
        "sink_prompt_rows",
    ],
)
def test_a_missing_tensor_is_refused(name: str) -> None:
    engine, state = point_six()
    whole = engine.save(state)
    part = {k: v for k, v in whole.tensors.items() if k != name}
    with pytest.raises(SnapshotCorrupt, match=rf"missing.*{name}"):
        engine.load(replace(whole, tensors=part))


def test_surplus_keys_are_refused() -> None:
    engine, state = point_six()
    whole = engine.save(state)
    extra = Buffer("uint8", (1,), b"x")
    with pytest.raises(SnapshotCorrupt, match=r"surplus.*more"):
        engine.load(replace(whole, tensors={**whole.tensors, "more": extra}))
    with pytest.raises(SnapshotCorrupt, match=r"surplus.*more"):
        engine.load(replace(whole, header={**whole.header, "more": 1}))
    with pytest.raises(SnapshotCorrupt, match=r"missing.*prompt"):
        engine.load(replace(whole, header={"kind": "session", "sink_prompt": "x"}))


def test_a_tensor_of_another_geometry_is_refused() -> None:
    engine, state = point_six()
    whole = engine.save(state)
    bad = Buffer("float32", (1,), bytes(4))
    with pytest.raises(SnapshotCorrupt, match="history"):
        engine.load(replace(whole, tensors={**whole.tensors, "history": bad}))
    with pytest.raises(SnapshotCorrupt, match="counters"):
        engine.load(replace(whole, tensors={**whole.tensors, "counters": bad}))
    for name, size in {"prompt_rows": (1, 7, 16), "given": (1, 2, 4, 4, 4)}.items():
        odd = Buffer("float32", size, bytes(4 * prod(size)))
        with pytest.raises(SnapshotCorrupt, match=name):
            engine.load(replace(whole, tensors={**whole.tensors, name: odd}))


def test_a_snapshot_of_another_model_is_refused() -> None:
    _, state = point_six()
    snapshot = small_engine(point_every=6).save(state)
    with pytest.raises(SnapshotForeign, match="this engine runs"):
        small_engine(point_every=3).load(snapshot)
