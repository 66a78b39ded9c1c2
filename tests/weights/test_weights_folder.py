"""A weights folder: what it gives, and every way in which it can be wrong."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from published import published_preset
from safetensors.torch import save_file

from echo_ray.errors import WeightsError
from echo_ray.preset import Preset, WanVaeShape, with_codec
from echo_ray.weights.folder import WeightsFolder
from echo_ray.weights.manifest import Source, read_manifest, write_manifest

TENSORS = {
    "dit.a.weight": torch.arange(6.0).reshape(2, 3),
    "dit.b": torch.full((4,), 0.5),
    "text.words": torch.arange(3, dtype=torch.int64),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "weights.safetensors")
    write_manifest(tmp_path, published_preset(), ["weights.safetensors"])
    return tmp_path


def change(folder: Path, **values: Any) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(data | values))


def test_parts_come_back_under_their_own_keys(folder: Path) -> None:
    opened = WeightsFolder.open(folder)
    assert (opened.preset, opened.path) == ("published-small", folder)
    assert opened.has("dit")
    assert not opened.has("codec")
    part = opened.part("dit")
    assert set(part) == {"a.weight", "b"}
    assert torch.equal(part["a.weight"], TENSORS["dit.a.weight"])
    assert opened.part("text")["words"].dtype == torch.int64
    assert opened.tokenizer == folder / "tokenizer"


def test_another_dtype_is_converted_and_the_same_one_stays_mapped(folder: Path) -> None:
    opened = WeightsFolder.open(folder)
    assert opened.part("dit", dtype=torch.bfloat16)["b"].dtype == torch.bfloat16
    assert mapped_file(opened.part("dit", dtype=torch.float32)["b"]) == "weights.safetensors"


def mapped_file(tensor: torch.Tensor) -> str | None:
    """Name of the file that a tensor's memory is a mapping of."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(n, 16) for n in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last and "/" in line:
            return Path(line[line.index("/") :]).name
    return None


def test_a_part_may_lie_in_several_files(tmp_path: Path) -> None:
    save_file({"dit.a": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"dit.b": torch.ones(1), "text.c": torch.ones(2)}, tmp_path / "two.safetensors")
    write_manifest(tmp_path, published_preset(), ["one.safetensors", "two.safetensors"])
    assert set(WeightsFolder.open(tmp_path).part("dit")) == {"a", "b"}
    save_file({"dit.a": torch.zeros(1)}, tmp_path / "three.safetensors")
    write_manifest(tmp_path, published_preset(), ["one.safetensors", "three.safetensors"])
    with pytest.raises(WeightsError, match=r"dit\.a is in one.* and three"):
        WeightsFolder.open(tmp_path)


def test_the_digest_is_that_of_names_and_hashes(folder: Path) -> None:
    sha = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    expected = hashlib.sha256(f"weights.safetensors\0{sha}\n".encode()).hexdigest()
    assert WeightsFolder.open(folder).digest == expected


def test_a_manifest_is_read_back_as_it_was_written(folder: Path) -> None:
    source = Source("dit", "x.pt", 12, "ab", "EMA")
    written = write_manifest(folder, published_preset(), ["weights.safetensors"], [source])
    assert read_manifest(folder) == written
    assert written.sources == (source,)


def test_a_folder_without_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(WeightsError, match="echo-ray weights convert SRC DST"):
            WeightsFolder.open(path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"format": "other"}, "format is not"),
        ({"version": 2}, "version 2 is not 1"),
        ({"config": {}}, "config.name: missing"),
        ({"config": 3}, "expected a mapping"),
        ({"files": {"../x": {"bytes": 1, "sha256": ""}}}, "outside the folder"),
        ({"files": {"/x": {"bytes": 1, "sha256": ""}}}, "outside the folder"),
        ({"files": {"x": {"bytes": 1}}}, "damaged"),
        ({"files": {"x": {"bytes": "1", "sha256": ""}}}, "damaged"),
        ({"files": 7}, "damaged"),
        ({"sources": [{"what": 1}]}, "damaged"),
        ({"files": {"gone.safetensors": {"bytes": 1, "sha256": ""}}}, "gone.* missing"),
    ],
)
def test_a_wrong_manifest_is_refused(folder: Path, values: dict[str, Any], said: str) -> None:
    change(folder, **values)
    with pytest.raises(WeightsError, match=said):
        WeightsFolder.open(folder)


def test_a_manifest_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")
    with pytest.raises(WeightsError, match="not JSON"):
        WeightsFolder.open(folder)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    with pytest.raises(WeightsError, match="cannot be read"):
        WeightsFolder.open(folder)


def test_a_file_cut_short_is_refused_at_once(folder: Path) -> None:
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(WeightsError, match="cut short"):
        WeightsFolder.open(folder)


def test_a_flipped_bit_is_found_before_a_tensor_is_given(folder: Path) -> None:
    file = folder / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    opened = WeightsFolder.open(folder)
    with pytest.raises(WeightsError, match="damaged"):
        opened.part("dit")


def test_a_changed_tokenizer_is_found_at_once(folder: Path) -> None:
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer.json").write_text("{}")
    write_manifest(folder, published_preset(), ["weights.safetensors", "tokenizer/tokenizer.json"])
    WeightsFolder.open(folder)
    (folder / "tokenizer/tokenizer.json").write_text("[]")
    with pytest.raises(WeightsError, match=r"tokenizer\.json: damaged"):
        WeightsFolder.open(folder)


def test_a_file_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = WeightsFolder.open(folder)
    opened.part("dit")
    monkeypatch.setattr("echo_ray.weights.folder.file_record", None)
    opened.part("text")


def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"nonsense")
    write_manifest(tmp_path, published_preset(), ["weights.safetensors"])
    with pytest.raises(WeightsError, match="not a safetensors file"):
        WeightsFolder.open(tmp_path)
    save_file({"plain": torch.zeros(1)}, tmp_path / "weights.safetensors")
    write_manifest(tmp_path, published_preset(), ["weights.safetensors"])
    with pytest.raises(WeightsError, match="belongs to no part"):
        WeightsFolder.open(tmp_path)


def test_a_part_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights of codec .*holds dit, text"):
        WeightsFolder.open(folder).part("codec")


def test_the_preset_it_was_made_for_fits(folder: Path) -> None:
    preset = published_preset()
    memory = preset.cache.memory
    assert memory is not None
    opened = WeightsFolder.open(folder)
    opened.check(preset)
    opened.check(replace(preset, fps=8, dtype="bfloat16"))
    opened.check(without_memory(preset))
    opened.check(
        replace(preset, cache=replace(preset.cache, memory=replace(memory, recache=False)))
    )


def without_memory(preset: Preset) -> Preset:
    return replace(preset, cache=replace(preset.cache, memory=None))


def resized(preset: Preset, **values: int) -> Preset:
    return replace(preset, dit=replace(preset.dit, **values))  # type: ignore[arg-type]


def test_another_model_is_refused_key_by_key(folder: Path) -> None:
    other = resized(published_preset(), num_layers=3, ffn_dim=48)
    with pytest.raises(WeightsError, match=r"dit\.num_layers is 2 here, 3 there") as caught:
        WeightsFolder.open(folder).check(other)
    assert "dit.ffn_dim is 24 here, 48 there" in caught.value.message
    assert "resolution" not in caught.value.message


def test_many_differences_are_cut_off(folder: Path) -> None:
    values = {"dim": 8, "num_heads": 1, "ffn_dim": 4, "num_layers": 1, "text_dim": 8}
    values |= {"latent_height": 2, "latent_width": 2, "text_len": 4, "freq_dim": 16}
    with pytest.raises(WeightsError, match="and 1 more"):
        WeightsFolder.open(folder).check(resized(published_preset(), **values))


def test_another_resolution_is_explained_by_the_memory(folder: Path) -> None:
    larger = resized(published_preset(), latent_height=8)
    with pytest.raises(WeightsError, match="the resolution is fixed by the trained memory"):
        WeightsFolder.open(folder).check(larger)
    without = resized(without_memory(published_preset()), latent_height=8)
    WeightsFolder.open(folder).check(without)


def test_the_small_codec_may_take_the_codecs_place(tmp_path: Path) -> None:
    preset = published_preset()
    write_manifest(tmp_path, preset, [])
    opened = WeightsFolder.open(tmp_path)
    opened.check(with_codec(preset, "tiny"))
    opened.check(with_codec(preset, "wan"))
    assert isinstance(preset.codec, WanVaeShape)
    shifted = replace(preset, codec=replace(preset.codec, mean=(0.0,) * 4))
    with pytest.raises(WeightsError, match=r"codec\.mean"):
        opened.check(shifted)
