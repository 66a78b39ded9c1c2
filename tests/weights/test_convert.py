"""Published files become one folder: every tensor where it belongs, or nothing and a reason."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from published import change, published_preset, read
from torch import Tensor

from echo_ray.errors import ConfigError, WeightsError
from echo_ray.preset import Preset, load_preset
from echo_ray.weights.containers import plain_state
from echo_ray.weights.convert import convert
from echo_ray.weights.folder import WeightsFolder
from echo_ray.weights.layout import expected
from echo_ray.weights.lora import apply_lora
from echo_ray.weights.plan import make_plan
from echo_ray.weights.sources import Options
from echo_ray.weights.synthetic import STYLES, synthesize

PRESET = published_preset()
MEMORY = "query_memory_encoder"


def converted(
    src: Path, preset: Preset = PRESET, dtype: str | None = None, **named: Any
) -> WeightsFolder:
    dst = src.parent / "dst"
    convert(make_plan(src, preset, Options(**named), dtype), dst)
    return WeightsFolder.open(dst)


def refused(src: Path, preset: Preset = PRESET, **named: Any) -> str:
    with pytest.raises(WeightsError) as caught:
        make_plan(src, preset, Options(**named))
    return caught.value.message


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value.to(found[key].dtype)), key


def transformer(src: Path, name: str = "generator") -> dict[str, Tensor]:
    state = plain_state(read(src / "echo_infinity.pt")[name], src)
    return {k: v for k, v in state.items() if not k.startswith(MEMORY)}


def adapter(src: Path) -> dict[str, Any]:
    return read(src / "echo_infinity_lora.pt")


def test_every_part_arrives_with_the_adapter_merged(src: Path) -> None:
    folder = converted(src)
    assert {part: folder.shapes(part) for part in folder.index} == expected(PRESET)
    lora = adapter(src)
    assert_same(folder.part("dit"), apply_lora(transformer(src), lora["generator_lora"]))
    assert_same(folder.part("memory"), lora[MEMORY])
    assert_same(folder.part("text"), read(src / "models_t5_umt5-xxl-enc-bf16.pth"))
    assert_same(folder.part("codec"), read(src / "Wan2.1_VAE.pth"))
    assert_same(folder.part("small_codec"), read(src / "taew2_1.pth"))
    copied = (folder.tokenizer / "tokenizer.json").read_bytes()
    assert copied == (src / "google/umt5-xxl/tokenizer.json").read_bytes()
    assert {v.dtype for part in folder.index for v in folder.part(part).values()} == {torch.float32}


def test_the_manifest_tells_where_everything_came_from(src: Path) -> None:
    folder = converted(src, lora_alpha=3.0)
    folder.check(PRESET)
    assert folder.manifest.config == PRESET
    rows = {(s.part, s.file): s for s in folder.manifest.sources}
    assert set(rows) == {
        ("dit", "echo_infinity.pt"),
        ("dit", "echo_infinity_lora.pt"),
        ("memory", "echo_infinity_lora.pt"),
        ("text", "models_t5_umt5-xxl-enc-bf16.pth"),
        ("text", "tokenizer.json"),
        ("codec", "Wan2.1_VAE.pth"),
        ("small_codec", "taew2_1.pth"),
    }
    lora = rows["dit", "echo_infinity_lora.pt"]
    assert lora.note == "LoRA of rank 2, alpha 3, merged"
    assert lora.bytes == (src / lora.file).stat().st_size
    expected_dit = apply_lora(transformer(src), adapter(src)["generator_lora"], 3.0)
    assert_same(folder.part("dit"), expected_dit)


def test_the_same_files_give_the_same_digest(src: Path, tmp_path: Path) -> None:
    one = converted(src).digest
    convert(make_plan(src, PRESET), tmp_path / "again")
    assert WeightsFolder.open(tmp_path / "again").digest == one
    convert(make_plan(src, PRESET, Options(ema=True)), tmp_path / "other")
    assert WeightsFolder.open(tmp_path / "other").digest != one


@pytest.mark.parametrize(
    ("preset", "dtype", "dit", "text", "small"),
    [
        ("bfloat16", None, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("float32", "bfloat16", torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("bfloat16", "float32", torch.float32, torch.float32, torch.float32),
        ("bfloat16", "keep", torch.float32, torch.bfloat16, torch.float16),
    ],
)
def test_the_dtype_is_the_presets_unless_named(
    src: Path, preset: str, dtype: str | None, dit: torch.dtype, text: torch.dtype,
    small: torch.dtype,
) -> None:  # fmt: skip
    folder = converted(src, replace(PRESET, dtype=preset), dtype)
    for part, kind in (("dit", dit), ("text", text), ("small_codec", small)):
        assert {value.dtype for value in folder.part(part).values()} == {kind}


def test_the_average_is_taken_on_demand(src: Path) -> None:
    averaged = transformer(src, "generator_ema")
    lora = adapter(src)["generator_lora"]
    assert_same(converted(src, ema=True).part("dit"), apply_lora(averaged, lora))


@pytest.mark.parametrize("style", STYLES)
def test_without_adapter_the_generator_is_taken_as_merged(tmp_path: Path, style: str) -> None:
    src = tmp_path / "src"
    synthesize(PRESET, src, seed=3, style=style)
    (src / "echo_infinity_lora.pt").unlink()
    data = read(src / "echo_infinity.pt")
    state = plain_state(data if style == "bare" else data[style], src)
    plan = make_plan(src, PRESET)
    assert any("no adapter given: taken as merged" in note for note in plan.notes)
    folder = converted(src)
    dit = {k: v for k, v in state.items() if not k.startswith(MEMORY)}
    assert_same(folder.part("dit"), dit)
    memory = {k.removeprefix(f"{MEMORY}."): v for k, v in state.items() if k not in dit}
    del memory["norm_k_out.weight"]
    assert_same(folder.part("memory"), memory)
    notes = [source.note for source in folder.manifest.sources]
    assert any("taken as merged" in note for note in notes)
    assert any("norm_k_out.weight left out" in note for note in notes)


def short(preset: Preset = PRESET) -> Preset:
    normalised = published_preset(normalize_keys=True)
    return replace(preset, cache=replace(normalised.cache, policy="absolute"))


def test_the_short_model_is_the_generator_alone(src: Path) -> None:
    plan = make_plan(src, short())
    assert any("echo_infinity_lora.pt: not used" in note for note in plan.notes)
    folder = converted(src, short())
    assert_same(folder.part("dit"), transformer(src))
    state = plain_state(read(src / "echo_infinity.pt")["generator"], src)
    memory = {k.removeprefix(f"{MEMORY}."): v for k, v in state.items() if k.startswith(MEMORY)}
    assert "norm_k_out.weight" in memory
    assert_same(folder.part("memory"), memory)


def test_the_memorys_key_norm_is_required_where_it_is_used(src: Path) -> None:
    change(
        src / "echo_infinity.pt", lambda d: d["generator"].pop(f"model.{MEMORY}.norm_k_out.weight")
    )
    assert r"memory: 1 missing: norm_k_out.weight" in refused(src, short())


def test_a_memory_of_its_own_file_comes_first(src: Path, tmp_path: Path) -> None:
    state = {k: v + 1 for k, v in adapter(src)[MEMORY].items()}
    torch.save(state, tmp_path / "memory.pt")
    assert_same(converted(src, memory=tmp_path / "memory.pt").part("memory"), state)


def test_an_adapter_without_memory_leaves_the_generators(src: Path) -> None:
    change(src / "echo_infinity_lora.pt", lambda d: d.pop(MEMORY))
    state = plain_state(read(src / "echo_infinity.pt")["generator"], src)
    found = converted(src).part("memory")
    assert torch.equal(found["query_init"], state[f"{MEMORY}.query_init"])


def without_memory(data: dict[str, Any]) -> None:
    generator = data["generator"]
    for key in [key for key in generator if MEMORY in key]:
        del generator[key]


def test_a_missing_memory_encoder_is_an_error_in_words(src: Path) -> None:
    change(src / "echo_infinity.pt", without_memory)
    change(src / "echo_infinity_lora.pt", lambda d: d.pop(MEMORY))
    said = refused(src)
    assert "no memory encoder" in said
    assert "random ones are never used" in said
    assert "--memory" in said


def test_a_model_without_memory_has_no_use_for_one(src: Path) -> None:
    plain = replace(PRESET, cache=replace(PRESET.cache, memory=None))
    assert "has none" in refused(src, plain)


def test_all_problems_of_all_parts_are_told_at_once(src: Path) -> None:
    def spoil(data: dict[str, Any]) -> None:
        for block in (0, 1):
            wrapped = f"model.blocks.{block}._fsdp_wrapped_module._checkpoint_wrapped_module"
            for name in ("q", "k", "v", "o"):
                del data["generator"][f"{wrapped}.cross_attn.{name}.bias"]
                del data["generator"][f"{wrapped}.self_attn.{name}.bias"]
        data["generator"]["model.blocks.2.modulation"] = torch.zeros(1)
        data["generator"]["model.head.head.bias"] = torch.zeros(3)

    change(src / "echo_infinity.pt", spoil)
    change(src / "echo_infinity_lora.pt", lambda d: d["generator_lora"].popitem())
    change(src / "Wan2.1_VAE.pth", lambda d: d.pop("conv2.bias"))
    change(src / "taew2_1.pth", lambda d: d.update(surplus=torch.zeros(1)))
    (src / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"PK\x03\x04")
    (src / "google/umt5-xxl/tokenizer.json").write_text("{}")
    said = refused(src)
    for part in (
        "dit: 16 missing: blocks.0.cross_attn.k.bias, ",
        " and 8 more",
        "dit: 1 surplus: blocks.2.modulation",
        "dit: 1 misshapen: head.head.bias (3,) for (16,)",
        "1 missing: blocks.1.ffn.2.lora_B",
        "codec: 1 missing: conv2.bias",
        "small_codec: 1 surplus: surplus",
        "truncated or damaged",
        "cannot be read as a tokenizer",
    ):
        assert part in said, part


def test_another_memory_size_is_explained_by_the_resolution(src: Path) -> None:
    said = refused(src, published_preset(latent_height=8))
    assert "misshapen: query_init (1, 12, 16) for (1, 24, 16)" in said
    assert "the resolution is fixed by the trained memory encoder" in said


MISSING = {
    "echo_infinity.pt": "no generator: echo_infinity.pt is not there (name it with --generator)",
    "Wan2.1_VAE.pth": "no VAE: Wan2.1_VAE.pth is not there (name it with --vae)",
    "models_t5_umt5-xxl-enc-bf16.pth": "no text encoder",
    "google/umt5-xxl/tokenizer.json": "no tokenizer: google/umt5-xxl/tokenizer.json is not there",
}


@pytest.mark.parametrize("file", MISSING)
def test_a_missing_file_is_named_with_its_option(src: Path, file: str) -> None:
    (src / file).unlink()
    assert MISSING[file] in refused(src)


def test_everything_missing_is_named_at_once(tmp_path: Path) -> None:
    said = refused(tmp_path)
    assert all(text in said for text in MISSING.values())
    assert "is not a folder" in refused(tmp_path / "gone")


def test_the_small_codec_may_be_missing(src: Path) -> None:
    (src / "taew2_1.pth").unlink()
    folder = converted(src)
    assert not folder.has("small_codec")
    assert any("goes without small_codec" in note for note in make_plan(src, PRESET).notes)


TWICE = {
    "echo_infinity.pt": "--generator",
    "Wan2.1_VAE.pth": "--vae",
    "models_t5_umt5-xxl-enc-bf16.pth": "--text",
    "taew2_1.pth": "--small-codec",
    "echo_infinity_lora.pt": "--lora",
    "google/umt5-xxl/tokenizer.json": "--tokenizer",
}


@pytest.mark.parametrize("file", TWICE)
def test_two_files_of_a_kind_are_not_guessed_between(src: Path, file: str) -> None:
    other = src / "other" / file
    other.parent.mkdir(parents=True)
    shutil.copy(src / file, other)
    said = refused(src)
    assert str(src / file) in said
    assert str(other) in said
    assert f"choose: {TWICE[file]}" in said
    name = TWICE[file].removeprefix("--").replace("-", "_")
    chosen = other.parent if name == "tokenizer" else other
    make_plan(src, PRESET, replace(Options(), **{name: chosen}))  # type: ignore[arg-type]


def test_links_to_one_file_count_once(src: Path) -> None:
    blob = src / "blobs" / "abc"
    blob.parent.mkdir()
    (src / "Wan2.1_VAE.pth").rename(blob)
    (src / "snapshot").mkdir()
    for place in (src, src / "snapshot"):
        (place / "Wan2.1_VAE.pth").symlink_to(blob)
    make_plan(src, PRESET)


def test_files_deeper_down_and_as_safetensors_are_found(src: Path) -> None:
    from safetensors.torch import save_file

    (src / "deep" / "er").mkdir(parents=True)
    vae = read(src / "Wan2.1_VAE.pth")
    save_file(vae, src / "deep/er/Wan2.1_VAE.safetensors")
    (src / "Wan2.1_VAE.pth").unlink()
    assert_same(converted(src).part("codec"), vae)


def test_only_presets_with_published_files_convert(src: Path) -> None:
    with pytest.raises(ConfigError, match="echo-tiny: is not made of published checkpoints"):
        make_plan(src, load_preset("echo-tiny"))
    with pytest.raises(ConfigError, match="--dtype: 'int8' is not allowed"):
        make_plan(src, PRESET, dtype="int8")
