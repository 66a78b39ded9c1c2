"""Clips of several scenes: what a stream with changing prompts is learned from."""

from __future__ import annotations

import numpy as np
import pytest

from echo_ray.preset import load_preset
from echo_ray.training.bank import (
    bank_digest,
    build,
    captions_of,
    pixels_of,
    scene_lengths,
    scenes_of,
)
from echo_ray.training.recipe import SHORTEST_SCENE, ClipsSection
from echo_ray.training.trainable import new_codec


@pytest.mark.parametrize(("chunks", "longest"), [(60, 20), (21, 20), (30, 10), (11, 10), (20, 20)])
def test_scenes_fill_a_clip_and_keep_their_bounds(chunks: int, longest: int) -> None:
    section = ClipsSection(chunks=chunks, scene_chunks=longest)
    seen = set()
    for seed in range(200):
        lengths = scene_lengths(np.random.default_rng(seed), section)
        assert sum(lengths) == chunks
        assert all(SHORTEST_SCENE <= n <= longest for n in lengths)
        seen.add(len(lengths))
    assert (seen == {1}) == (chunks == longest)


def test_a_clip_is_one_scene_unless_the_recipe_says_otherwise() -> None:
    assert scene_lengths(np.random.default_rng(0), ClipsSection(chunks=60)) == [60]


def test_a_clip_of_scenes_is_as_long_as_a_stream_of_its_chunks() -> None:
    preset = load_preset("echo-tiny")
    section = ClipsSection(count=2, chunks=24, scene_chunks=12, hide_share=1.0)
    scenes = scenes_of(preset, section, 1)
    assert len(scenes) >= 2
    assert {scene.script.kind for scene in scenes} == {"hide"}
    assert len(captions_of(scenes)) == 24
    frames = preset.first_chunk_frames + 23 * preset.frames_per_chunk
    assert pixels_of(preset, scenes).shape == (frames, 3, preset.height, preset.width)
    again = scenes_of(preset, section, 1)
    assert captions_of(again) == captions_of(scenes)
    assert not np.array_equal(
        pixels_of(preset, again)[:9], pixels_of(preset, scenes_of(preset, section, 0))[:9]
    )


def test_a_bank_of_more_objects_is_another_bank() -> None:
    preset = load_preset("echo-tiny")
    codec = new_codec(preset).eval()
    more = ClipsSection(count=40, hide_share=0.0, two_objects=1.0)
    clips = [scene for n in range(more.count) for scene in scenes_of(preset, more, n)]
    free = [c.script.colour_KO.shape[1] for c in clips if c.script.kind in ("steady", "switch")]
    assert set(free) == {2}
    usual = ClipsSection(count=40, hide_share=0.0)
    assert bank_digest(preset, codec, more) != bank_digest(preset, codec, usual)


def test_the_bank_knows_which_chunks_of_which_scene_are_hidden() -> None:
    preset = load_preset("echo-tiny")
    section = ClipsSection(count=2, chunks=20, scene_chunks=10, hide_share=1.0)
    codec = new_codec(preset).eval()
    bank = build(preset, section, codec, "test", bf16=False)
    assert bank.latents_SFChw.shape[:2] == (2, 60)
    for index in range(2):
        hidden = [h for scene in scenes_of(preset, section, index) for h in scene.script.hidden_K]
        assert bank.hidden_SK[index].tolist() == hidden
        assert any(hidden)
    assert bank.objects_S.tolist() == [1, 1]
