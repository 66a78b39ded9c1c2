"""Captions say what is to be seen, in many ways, and the model's reader understands every one."""

from __future__ import annotations

import numpy as np
import pytest

from echo_ray.model.words import IDS, VOCABULARY, read_prompt
from echo_ray.preset import load_preset
from echo_ray.scenes.captions import (
    BARE,
    FILLED,
    FILLERS,
    NOTHING,
    PLAIN,
    SCENES,
    SYNONYMS,
    WORDINGS,
    paraphrases,
    say,
)
from echo_ray.scenes.clips import Clip, make_clip
from echo_ray.scenes.scripts import KINDS
from echo_ray.scenes.world import BACKGROUNDS, COLOURS, RADII, SHAPES, SPEEDS

COLOUR_NAMES, BACKGROUND_NAMES = tuple(COLOURS), tuple(BACKGROUNDS)
TEXT_LEN = load_preset("echo-tiny").dit.text_len
SILENT_MARKS = {"leaves", "enters"}


def test_what_is_to_be_remembered_is_mostly_seen_and_not_said() -> None:
    named = {
        kind: sum(
            any(colour in caption.split() for colour in COLOURS)
            for clip in (clip_of(seed, kind) for seed in range(200))
            for caption in [
                next(c for c, h in zip(clip.captions, clip.script.hidden_K, strict=True) if not h)
            ]
        )
        for kind in ("hide", "cross")
    }
    assert 40 < named["hide"] < 140 < named["cross"]


def clip_of(seed: int, kind: str | None = None) -> Clip:
    return make_clip(np.random.default_rng([seed, 5]), 10, 64, 9, 12, kind)


def many(count: int = 150, kind: str | None = None) -> list[Clip]:
    return [clip_of(seed, kind) for seed in range(count)]


def understood(caption: str) -> list[str]:
    return [VOCABULARY[i] for i in read_prompt(caption)[0]]


def named_background(words: list[str]) -> str | None:
    """The colour beside the word background: before it, or behind "the background is"."""
    if "background" not in words:
        return None
    at = words.index("background")
    if at and words[at - 1] in BACKGROUNDS:
        return words[at - 1]
    return next(w for w in words[at + 1 : at + 3] if w in BACKGROUNDS)


def test_there_are_ten_templates_and_more_in_sound_proportions() -> None:
    assert len(SCENES) >= 10
    for shares in (SCENES, BARE, NOTHING):
        assert sum(shares.values()) == pytest.approx(1)


def test_every_caption_fits_the_reader_and_no_word_that_matters_is_unknown() -> None:
    for clip in many(400):
        for caption in clip.captions:
            ids, _, ignored = read_prompt(caption)
            assert 0 < len(ids) <= TEXT_LEN
            assert set(ignored) <= SILENT_MARKS | set(FILLERS)


def test_captions_name_the_background_and_every_visible_shape() -> None:
    for clip in many():
        s = clip.script
        returned = False
        for k, caption in enumerate(clip.captions):
            words = understood(caption)
            background = named_background(words)
            assert background in (None, BACKGROUND_NAMES[s.background_K[k]])
            returned |= "back" in words
            shown = sorted(SHAPES[x] for x in s.shape_KO[k][s.visible_KO[k]])
            said = sorted(w for w in words if w in SHAPES)
            assert said == shown or (returned and not said)


def test_empty_is_said_of_empty_chunks_and_of_those_that_an_object_leaves_or_enters() -> None:
    for kind in KINDS:
        for clip in many(20, kind):
            for k, caption in enumerate(clip.captions):
                expected = clip.script.hidden_K[k] or clip.script.border_KO[k].any()
                assert ("empty" in understood(caption)) == expected
                if clip.script.hidden_K[k]:
                    assert named_background(understood(caption))


def test_what_changes_is_always_said() -> None:
    changes = 0
    for clip in many(200):
        s = clip.script
        if (s.colour_KO != s.colour_KO[0]).any():
            for k, caption in enumerate(clip.captions):
                words = understood(caption)
                assert all(COLOUR_NAMES[c] in words for c in s.colour_KO[k][s.visible_KO[k]])
            changes += 1
        if (s.background_K != s.background_K[0]).any():
            assert all(named_background(understood(c)) for c in clip.captions)
    assert changes > 10


def test_attributes_are_left_out_of_some_clips_but_never_of_a_part_of_one() -> None:
    for name, words in (("size", set(RADII)), ("speed", set(SPEEDS)), ("colour", set(COLOURS))):
        with_it = 0
        steady = many(120, "steady")
        for clip in steady:
            # The blue of a background is no object's.
            said = [
                bool(words & set(c.replace("blue background", "").replace("is blue", "").split()))
                for c in clip.captions
            ]
            assert len(set(said)) == 1
            with_it += said[0]
        assert 20 < with_it < 119, name


def test_it_comes_back_is_said_only_after_it_left() -> None:
    returns = 0
    for clip in many(120):
        for k, caption in enumerate(clip.captions):
            if "back" in understood(caption):
                returns += 1
                before = clip.script.visible_KO[:k, 0]
                shown = np.flatnonzero(before)
                assert shown.size
                assert not before[shown[0] :].all()
    assert returns > 20


def test_most_hidden_objects_return_without_a_word_about_them() -> None:
    silent = 0
    for clip in many(60, "hide"):
        words = set(understood(clip.captions[-1]))
        silent += "back" in words and not words & set(SHAPES)
    assert 30 < silent < 55


def test_wordings_vary_and_some_hold_words_that_nobody_knows() -> None:
    orders = set()
    filled = 0
    clips = many(300)
    for clip in clips:
        words = understood(clip.captions[0])
        orders.add(tuple("colour" if w in COLOURS else w for w in words))
        filled += any(set(c.split()) & set(FILLERS) for c in clip.captions)
    assert len(orders) > 100
    assert filled / len(clips) == pytest.approx(FILLED, abs=0.06)


def test_fillers_are_unknown_to_the_reader() -> None:
    assert read_prompt(" ".join(FILLERS))[0] == []


def test_sentences_read_like_sentences() -> None:
    for clip in many(300):
        for caption in clip.captions:
            assert "a empty" not in caption
            assert "there is it" not in caption
            assert not any(mark in caption for mark in (",,", " ,", "  "))
            assert caption == caption.strip(" ,")


def test_the_plain_wording_names_everything() -> None:
    clip = clip_of(3, "steady")
    s = clip.script
    words = say(s, 0, PLAIN).split()
    for o in range(s.colour_KO.shape[1]):
        for name in (
            COLOUR_NAMES[s.colour_KO[0, o]],
            SHAPES[s.shape_KO[0, o]],
            list(RADII)[s.size_O[o]],
        ):
            assert name in words
    assert named_background(words) == BACKGROUND_NAMES[s.background_K[0]]
    gone = clip_of(3, "empty")
    assert say(gone.script, 0, PLAIN).startswith("an empty")


def test_every_synonym_is_read_as_the_word_it_stands_for() -> None:
    for word, others in SYNONYMS.items():
        for other in others:
            assert read_prompt(other)[0] == [IDS[word]], other


def test_paraphrases_say_the_same_in_other_words() -> None:
    rng = np.random.default_rng(2)
    differ = dict.fromkeys(WORDINGS, 0)
    for clip in many(40):
        for k in (0, 5):
            said = paraphrases(rng, clip.script, k)
            assert tuple(said) == WORDINGS
            template = said["template"]
            pace = set(SPEEDS) & set(template.split())
            assert len(pace) == (clip.script.colour_KO.shape[1] == 1 and "empty" not in template)
            assert template.replace(f" {' '.join(pace)} ", " ") == say(clip.script, k, PLAIN)
            ids = read_prompt(template)[0]
            assert read_prompt(said["synonym"])[0] == ids
            assert read_prompt(said["filler"])[0] == ids
            assert sorted(understood(said["reordered"])) == sorted(understood(template)) or (
                "empty" in template
            )
            assert len(read_prompt(said["filler"])[2]) >= 6
            for name in WORDINGS:
                differ[name] += said[name] != template
    assert differ["reordered"] == differ["synonym"] == differ["filler"] == 80
