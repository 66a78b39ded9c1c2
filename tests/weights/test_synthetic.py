"""Made-up checkpoints look like published ones: names, containers, wrapper words, sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from published import published_preset

from echo_ray.errors import ConfigError, WeightsError
from echo_ray.model.tokens import PromptTokenizer
from echo_ray.preset import load_preset
from echo_ray.weights.layout import expected
from echo_ray.weights.parts import build_parts
from echo_ray.weights.synthetic import synthesize
from echo_ray.weights.synthetic_tokenizer import synthetic_tokenizer

PRESET = published_preset()


def content(file: Path) -> dict[str, Any]:
    data: dict[str, Any] = torch.load(file, weights_only=True)
    return data


def test_the_files_have_the_published_names_and_containers(tmp_path: Path) -> None:
    files = synthesize(PRESET, tmp_path / "src")
    assert {str(path.relative_to(tmp_path / "src")) for path in files} == {
        "echo_infinity.pt",
        "echo_infinity_lora.pt",
        "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "taew2_1.pth",
        "google/umt5-xxl/tokenizer.json",
    }
    generator = content(tmp_path / "src/echo_infinity.pt")
    assert {"generator", "generator_ema", "step"} == generator.keys()
    trained, averaged = generator["generator"], generator["generator_ema"]
    assert all(key.startswith("model.") for key in trained)
    assert "model.query_memory_encoder.query_init" in trained
    wrapped = "model.blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module.ffn.0.weight"
    assert wrapped in trained
    assert all(key.startswith("model._fsdp_wrapped_module.") for key in averaged)
    assert not any("query_memory_encoder" in key for key in averaged)
    lora = content(tmp_path / "src/echo_infinity_lora.pt")
    assert lora["generator_lora"]["base_model.model.blocks.0.ffn.2.lora_A.weight"].shape == (2, 24)
    assert len(lora["generator_lora"]) == 2 * 10 * PRESET.dit.num_layers
    assert lora["query_memory_encoder"]["query_init"].shape == (1, 12, 16)


def test_the_published_sizes_are_those_of_the_specification() -> None:
    wanted = expected(load_preset("echo-infinity-1.3b"))
    sizes = {part: sum(map(_count, shapes.values())) for part, shapes in wanted.items()}
    assert (len(wanted["dit"]), sizes["dit"]) == (825, 1_418_996_800)
    assert sizes["codec"] == 126_892_531
    assert round(sizes["memory"] / 1e6, 1) == 68.6
    assert round(sizes["text"] / 1e9, 2) == 5.68


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def test_values_depend_on_the_seed_and_the_place_alone(tmp_path: Path) -> None:
    synthesize(PRESET, tmp_path / "a", seed=1)
    synthesize(PRESET, tmp_path / "b", seed=1, only=["codec"])
    synthesize(PRESET, tmp_path / "c", seed=2, only=["codec"])
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["Wan2.1_VAE.pth"]
    a, b, c = (content(tmp_path / name / "Wan2.1_VAE.pth") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a[key], c[key]) for key in a)
    assert not torch.equal(a["decoder.upsamples.0.residual.2.weight"],
                           a["decoder.upsamples.1.residual.2.weight"])  # fmt: skip


def test_a_model_with_such_values_computes_finite_frames(tmp_path: Path) -> None:
    synthesize(PRESET, tmp_path / "src")
    codec = build_parts(PRESET)["codec"]
    codec.load_state_dict(content(tmp_path / "src/Wan2.1_VAE.pth"))
    latents = torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        frames, _ = codec.decode(latents, codec.initial_state())  # type: ignore[operator]
    assert frames.isfinite().all()
    assert frames.std() > 0.01


def test_the_short_model_has_no_adapter(tmp_path: Path) -> None:
    short = replace(PRESET, cache=replace(PRESET.cache, policy="absolute"))
    files = synthesize(short, tmp_path / "src", only=["dit", "memory"])
    assert [path.name for path in files] == ["echo_infinity.pt"]


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="echo-tiny: is not made of published checkpoints"):
        synthesize(load_preset("echo-tiny"), tmp_path / "src")
    with pytest.raises(ConfigError, match="style: 'x' is not allowed"):
        synthesize(PRESET, tmp_path / "src", style="x")
    with pytest.raises(ConfigError, match="'vae' is not a part of published-small: dit, memory"):
        synthesize(PRESET, tmp_path / "src", only=["vae"])
    with pytest.raises(ConfigError, match="add dit"):
        synthesize(PRESET, tmp_path / "src", only=["memory"])
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file"):
        with pytest.raises(WeightsError, match="is there already"):
            synthesize(PRESET, place)


def test_nothing_temporary_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(WeightsError, match="No space left on device"):
        synthesize(PRESET, tmp_path / "src", only=["codec"])
    assert list((tmp_path / "src").iterdir()) == []


@pytest.mark.parametrize("vocab", [128, 400, 5000])
def test_the_tokenizer_fits_its_encoder(tmp_path: Path, vocab: int) -> None:
    synthetic_tokenizer(vocab).save(str(tmp_path / "tokenizer.json"))
    tokens = PromptTokenizer.from_folder(tmp_path, 12, vocab)
    ids, mask = tokens("a ball")
    assert sum(mask) == ids.index(1) + 1
    assert len(set(ids[: ids.index(1)])) == 4
    assert all(2 < token < vocab for token in ids[: ids.index(1)])
