"""Verifying: a whole folder is told from a damaged one, and good files from bad, for a reason."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published import published_preset
from safetensors.torch import load_file, save_file

from echo_ray.preset import load_preset, preset_folder
from echo_ray.weights.convert import convert
from echo_ray.weights.folder import WeightsFolder
from echo_ray.weights.manifest import write_manifest
from echo_ray.weights.plan import make_plan
from echo_ray.weights.sources import Options
from echo_ray.weights.verify import verify

PRESET = published_preset()


@pytest.fixture(scope="module")
def made(untouched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "dst"
    convert(make_plan(untouched, PRESET), folder)
    return folder


@pytest.fixture
def dst(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "dst"))


def rewritten(dst: Path, name: str, changes: dict[str, torch.Tensor | None]) -> None:
    """Change tensors of a file (None: leave one out) and make the manifest fit again."""
    tensors = load_file(dst / name) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, dst / name)
    files = json.loads((dst / "manifest.json").read_text())["files"]
    write_manifest(dst, PRESET, list(files))


def test_a_converted_folder_is_whole(dst: Path) -> None:
    report = verify(dst, PRESET)
    assert report.ok
    assert report.lines[-1] == f"whole: {PRESET.name}, digest {WeightsFolder.open(dst).digest}"
    assert any(line.split()[:2] == ["dit", "69"] for line in report.lines)


def test_the_packaged_weights_are_whole_and_their_manifest_says_what_the_preset_says() -> None:
    preset = load_preset("echo-tiny")
    folder = preset_folder("echo-tiny")
    assert verify(folder, preset).problems == []
    assert WeightsFolder.open(folder).manifest.config == preset


def test_published_files_convert_and_nothing_is_written(src: Path) -> None:
    before = sorted(path for path in src.rglob("*"))
    report = verify(src, PRESET)
    assert report.ok
    assert report.lines[-1].startswith("these files convert: published-small, ")
    assert sorted(path for path in src.rglob("*")) == before


def test_published_files_that_do_not_convert_say_why(src: Path) -> None:
    data = torch.load(src / "Wan2.1_VAE.pth", weights_only=True)
    data["conv1.bias"].fill_(float("nan"))
    torch.save(data, src / "Wan2.1_VAE.pth")
    problems = verify(src, PRESET).problems
    assert len(problems) == 1
    assert "codec.conv1.bias: holds values that are not finite" in problems[0]
    del data["conv1.bias"]
    torch.save(data, src / "Wan2.1_VAE.pth")
    assert verify(src, PRESET).problems[1:] == ["codec: 1 missing: conv1.bias"]
    (src / "echo_infinity_lora.pt").rename(src / "adapter.pt")
    assert verify(src, PRESET).lines == []
    (src / "Wan2.1_VAE.pth").unlink()
    assert "no VAE" in verify(src, PRESET).problems[0]
    options = Options(vae=src / "gone.pth")
    assert "gone.pth: cannot be read" in "".join(verify(src, PRESET, options).problems)


def test_an_empty_folder_is_neither(tmp_path: Path) -> None:
    assert "no generator" in verify(tmp_path, PRESET).problems[0]
    assert "is not a folder" in verify(tmp_path / "gone", PRESET).problems[0]


def test_another_presets_folder_is_refused(dst: Path) -> None:
    other = replace(PRESET, dit=replace(PRESET.dit, num_layers=3))
    problems = "\n".join(verify(dst, other).problems)
    assert "dit.num_layers is 2 here, 3 there" in problems
    assert "missing: blocks.2." in problems


@pytest.mark.parametrize("name", ["codec.safetensors", "tokenizer/tokenizer.json"])
def test_a_changed_file_is_found(dst: Path, name: str) -> None:
    data = bytearray((dst / name).read_bytes())
    data[-2] ^= 1
    (dst / name).write_bytes(data)
    assert any(f"{dst / name}: damaged" in said for said in verify(dst, PRESET).problems)


def test_a_missing_or_short_file_is_found(dst: Path) -> None:
    file = dst / "codec.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "cut short" in verify(dst, PRESET).problems[0]
    file.unlink()
    assert "missing, but the manifest names it" in verify(dst, PRESET).problems[0]


def test_tensors_that_do_not_belong_are_found(dst: Path) -> None:
    rewritten(dst, "memory.safetensors", {"memory.query_init": None, "memory.x": torch.ones(1)})
    assert verify(dst, PRESET).problems == [
        "memory: 1 missing: query_init",
        "memory: 1 surplus: x",
    ]
    rewritten(dst, "memory.safetensors", {"nonsense.x": torch.ones(1)})
    assert f"nonsense: belongs to no part of {PRESET.name}" in verify(dst, PRESET).problems


def test_values_that_are_not_finite_are_found(dst: Path) -> None:
    value = torch.full((16,), float("inf"))
    rewritten(dst, "memory.safetensors", {"memory.to_k.bias": value})
    assert any("memory.to_k.bias: holds" in said for said in verify(dst, PRESET).problems)


def test_a_folder_without_the_small_codec_is_whole_and_says_so(dst: Path) -> None:
    (dst / "small_codec.safetensors").unlink()
    files = json.loads((dst / "manifest.json").read_text())["files"]
    write_manifest(dst, PRESET, [name for name in files if "small" not in name])
    report = verify(dst, PRESET)
    assert report.ok
    assert "small_codec: not in this folder" in report.lines
    (dst / "codec.safetensors").unlink()
    write_manifest(dst, PRESET, [n for n in files if "codec" not in n])
    assert verify(dst, PRESET).problems == ["codec: not in this folder"]


def test_a_folder_without_tokenizer_is_not_whole(dst: Path) -> None:
    files = json.loads((dst / "manifest.json").read_text())["files"]
    write_manifest(dst, PRESET, [name for name in files if "tokenizer" not in name])
    assert any("is not in the manifest" in said for said in verify(dst, PRESET).problems)
    shutil.rmtree(dst / "tokenizer")
    assert any("no tokenizer" in said for said in verify(dst, PRESET).problems)
