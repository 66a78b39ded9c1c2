"""Tiers taken away from a model are really gone, and nothing else has changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from small import _modules, small_clip, small_preset

from echo_ray.config import ModelSection
from echo_ray.errors import ConfigError
from echo_ray.evaluation.subject import (
    ModulesSubject,
    ServedSubject,
    check_world,
    window_chunks,
)
from echo_ray.evaluation.variants import Variant, apply
from echo_ray.preset import load_preset

CHUNKS = 8


def stream(subject: Any, variant: Variant, clip: bytes = b"") -> tuple[list[str], Any]:
    """Digests of a session's chunks, and its state in the end."""
    engine = subject.engine(variant, 0)
    state = engine.open("a red ball", 3, clip)
    return [engine.step(state).digest for _ in range(CHUNKS)], state


def clip_with_first_chunk(value: int) -> bytes:
    """Three chunks that differ in the first one alone."""
    clip, preset = bytearray(small_clip("group", 9 + 24)), small_preset()
    first = 9 * preset.height * preset.width * 3
    clip[:first] = bytes([value]) * first
    return bytes(clip)


def test_variants_part_when_the_tier_they_lack_is_first_seen(small_subject: Any) -> None:
    whole, state = stream(small_subject, Variant.WHOLE)
    assert state.latent.has_history
    apart = {}
    for variant in list(Variant)[1:]:
        other, _ = stream(small_subject, variant)
        apart[variant] = [a != b for a, b in zip(whole, other, strict=True)].index(True)
    # Nothing leaves the window, and no memory is seen, before chunk 4; the sink is from chunk 1 on.
    assert apart == {Variant.FROZEN: 4, Variant.SINK: 4, Variant.WINDOW: 1}


def test_a_frozen_memory_is_read_but_never_written(small_subject: Any) -> None:
    _, state = stream(small_subject, Variant.FROZEN)
    start = small_subject.modules.memory.initial(1)
    assert torch.equal(state.latent.query_BMC, start)
    assert state.latent.has_history
    _, state = stream(small_subject, Variant.WHOLE)
    assert not torch.equal(state.latent.query_BMC, start)
    _, state = stream(small_subject, Variant.SINK)
    assert state.latent.query_BMC is None


def test_without_a_sink_nothing_of_it_shows(small_subject: Any) -> None:
    clips = [clip_with_first_chunk(20), clip_with_first_chunk(200)]
    for variant, hidden in ((Variant.SINK, False), (Variant.WINDOW, True)):
        one, two = (stream(small_subject, variant, clip)[0] for clip in clips)
        assert one[0] != two[0]
        assert (one[3:] == two[3:]) == hidden


def test_fingerprints_tell_variants_apart(small_subject: Any) -> None:
    prints = {small_subject.engine(v).fingerprint for v in Variant}
    assert len(prints) == len(Variant)
    assert small_subject.engine(point_every=5).shape.point_every == 5


def test_weights_are_shared_and_the_whole_model_is_untouched() -> None:
    preset, modules = small_preset(), _modules(with_memory=True, codec="group")
    assert apply(preset, modules, Variant.WHOLE) == (preset, modules)
    _, blind = apply(preset, modules, Variant.WINDOW)
    weight = modules.dit.head.head.weight
    assert blind.dit.head.head.weight.data_ptr() == weight.data_ptr()
    assert type(modules.dit).__name__ == "DiT"


def test_a_model_without_memory_has_no_variants() -> None:
    preset, modules = small_preset(policy="window"), _modules(with_memory=False, codec="group")
    for variant in list(Variant)[1:]:
        with pytest.raises(ConfigError, match="preset small has no memory"):
            apply(preset, modules, variant)


def test_a_model_without_memory_is_recalled_by_as_it_is(oracle_with: Callable[..., Any]) -> None:
    from echo_ray.evaluation import recall
    from echo_ray.evaluation.rollout import Plan

    subject = oracle_with()
    subject.preset = replace(subject.preset, cache=replace(subject.preset.cache, memory=None))
    report = recall.measure(subject, Plan(cases=1))
    assert Variant.SINK.value not in report.figures
    assert any("no memory" in note for note in report.notes)


def test_the_served_model_is_the_served_engine_and_its_variants_have_its_weights() -> None:
    subject = ServedSubject(ModelSection())
    assert window_chunks(subject.preset) == 3
    served, unpointed = subject.engine(), subject.engine(point_every=0)
    assert served.shape.point_every == 8
    assert unpointed.shape.point_every == 0
    seen = []
    for engine in (served, unpointed):
        state = engine.open("a red ball on a black background", 1)
        seen.append([engine.step(state).digest for _ in range(2)])
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", ["echo-infinity-1.3b", "echo-infinity-1.3b-short"])
def test_other_worlds_have_no_detector(name: str) -> None:
    with pytest.raises(ConfigError, match=f"no detector for the videos of preset {name}"):
        check_world(load_preset(name), "recall")
    check_world(small_preset(), "recall")


def test_subjects_measure_what_they_are_given(small_subject: ModulesSubject) -> None:
    assert small_subject.engine().shape.model == "small"
