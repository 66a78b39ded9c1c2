"""Presets as data: the shipped ones, the choice of a codec, and what a preset may not say."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from echo_ray.config import from_mapping
from echo_ray.errors import ConfigError, EchoError, ModelUnknown
from echo_ray.preset import (
    PRESETS,
    Preset,
    TinyVaeShape,
    UMT5Shape,
    WanVaeShape,
    load_preset,
    read_preset,
    with_codec,
)

LONG = load_preset("echo-infinity-1.3b")


def test_the_published_model_is_the_specification_s() -> None:
    dit, cache = LONG.dit, LONG.cache
    assert (dit.dim, dit.num_heads, dit.ffn_dim, dit.num_layers) == (1536, 12, 8960, 30)
    assert (dit.tokens_per_frame, dit.text_dim, dit.text_len, dit.freq_dim) == (
        1560,
        4096,
        512,
        256,
    )
    assert (cache.frames_per_chunk, cache.window_frames, cache.sink_frames) == (3, 12, 3)
    assert (cache.local_frames, cache.position_limit, cache.global_sink) == (9, 21, True)
    assert cache.memory is not None
    assert cache.memory.frames * dit.tokens_per_frame == cache.memory.tokens == 4680
    assert LONG.sampler.steps == (1000, 750, 500, 250)
    assert (LONG.sampler.shift, LONG.sampler.kind, LONG.sampler.context_noise) == (
        5.0,
        "renoise",
        0,
    )
    assert isinstance(LONG.text, UMT5Shape)
    assert isinstance(LONG.codec, WanVaeShape)
    assert (LONG.codec.spatial_stride, LONG.codec.temporal_stride) == (8, 4)
    assert (LONG.width, LONG.height, LONG.fps, LONG.dtype) == (832, 480, 16, "bfloat16")
    assert (LONG.first_chunk_frames, LONG.frames_per_chunk) == (9, 12)


def test_the_two_stages_differ_where_the_specification_says_and_nowhere_else() -> None:
    short = load_preset("echo-infinity-1.3b-short")
    assert LONG.cache.memory is not None
    assert short.cache.memory is not None
    assert (LONG.cache.policy, short.cache.policy) == ("echo", "absolute")
    assert (LONG.cache.memory.normalize_keys, LONG.cache.memory.recache) == (False, True)
    assert (short.cache.memory.normalize_keys, short.cache.memory.recache) == (True, False)
    cache = replace(short.cache, policy="echo", memory=LONG.cache.memory)
    assert replace(short, name=LONG.name, cache=cache) == LONG


@pytest.mark.parametrize("file", sorted(PRESETS.glob("*/preset.toml")), ids=lambda f: f.parent.name)
def test_a_preset_is_called_like_its_folder_and_survives_as_data(file: Path) -> None:
    preset = read_preset(file)
    assert preset.name == file.parent.name
    assert from_mapping(Preset, asdict(preset)) == preset


def test_the_codec_is_chosen_by_name() -> None:
    assert with_codec(LONG, None) == with_codec(LONG, "wan") == replace(LONG, small_codec=None)
    small = with_codec(LONG, "tiny")
    assert isinstance(small.codec, TinyVaeShape)
    assert small.small_codec is None
    assert (small.width, small.height) == (832, 480)
    with pytest.raises(ConfigError, match=r"model\.vae: 'group'.*wan or tiny"):
        with_codec(LONG, "group")


def test_another_resolution_is_refused_with_the_reason() -> None:
    taller = replace(LONG.dit, latent_height=64)
    with pytest.raises(ConfigError, match=r"1560 tokens.*64 x 104.*1664.*fixed by the trained"):
        replace(LONG, dit=taller)


def test_a_folder_of_one_s_own_is_a_preset(tmp_path: Path) -> None:
    text = (PRESETS / "echo-infinity-1.3b" / "preset.toml").read_text()
    (tmp_path / "preset.toml").write_text(text.replace("point_every = 8", "point_every = 16"))
    assert load_preset(str(tmp_path)).cache.point_every == 16
    with pytest.raises(ModelUnknown, match=r"echo-tiny, or a folder with a preset\.toml"):
        load_preset(str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('kind = "wan"', 'kind = "vq"', r"codec\.kind: 'vq' is not one of group, wan, tiny"),
        ('kind = "umt5"', 'kind = "clip"', r"text\.kind: 'clip' is not one of words, umt5"),
        ('kind = "umt5"', "", r"text\.kind: None is not one of"),
        ("3.2687, ", "", r"codec\.std.*as long as codec\.mean"),
        ("[false, true, true]", "[true, true]", "one flag for each level"),
        ("1.9160,", "0.0,", r"codec\.std.*positive"),
        ("num_heads = 64", "num_heads = 60", r"text\.num_heads"),
        ("num_buckets = 32", "num_buckets = 30", r"text\.num_buckets"),
        ("max_distance = 128", "max_distance = 8", r"text\.max_distance"),
        ('dtype = "bfloat16"', 'dtype = "float8"', "dtype: 'float8'"),
        ('kind = "tiny"', 'kind = "tony"', r"codec\.kind: 'tony'"),
        ("dim_mult", "dim_malt", r"codec\.dim_malt: unknown \(did you mean dim_mult"),
    ],
)
def test_what_a_preset_may_not_say(old: str, new: str, reason: str, tmp_path: Path) -> None:
    text = (PRESETS / "echo-infinity-1.3b" / "preset.toml").read_text()
    assert old in text
    (tmp_path / "preset.toml").write_text(text.replace(old, new))
    with pytest.raises(EchoError, match=reason):
        read_preset(tmp_path / "preset.toml")


def test_latents_need_a_mean_for_each_channel() -> None:
    with pytest.raises(ConfigError, match=r"codec\.mean.*8 values"):
        replace(LONG, dit=replace(LONG.dit, in_channels=8))
