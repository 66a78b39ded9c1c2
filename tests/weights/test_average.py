"""The average of two folders: what it holds, and which pairs are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published import published_preset
from safetensors.torch import save_file
from torch import Tensor

from echo_ray.cli import main
from echo_ray.errors import WeightsError
from echo_ray.preset import load_preset
from echo_ray.weights.average import average
from echo_ray.weights.folder import WeightsFolder
from echo_ray.weights.manifest import write_manifest

WORDS = torch.arange(3, dtype=torch.int64)


def written(folder: Path, value: float, dtype: torch.dtype = torch.float16, **more: Tensor) -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    tensors = {"dit.a": torch.full((2, 3), value, dtype=dtype), "text.words": WORDS, **more}
    save_file(tensors, folder / "weights.safetensors")
    files = ["weights.safetensors", "tokenizer/tokenizer.json"]
    write_manifest(folder, published_preset(), files)
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return written(tmp_path / "a", 1.0), written(tmp_path / "b", 3.0)


@pytest.mark.parametrize(("share", "value"), [(0.0, 1.0), (0.25, 1.5), (1.0, 3.0)])
def test_every_tensor_lies_between_the_two(
    pair: tuple[Path, Path], tmp_path: Path, share: float, value: float
) -> None:
    average(*pair, tmp_path / "new", share)
    folder = WeightsFolder.open(tmp_path / "new")
    assert folder.part("dit")["a"].dtype == torch.float16
    assert torch.equal(folder.part("dit")["a"], torch.full((2, 3), value, dtype=torch.float16))
    assert torch.equal(folder.part("text")["words"], WORDS)
    assert (folder.tokenizer / "tokenizer.json").read_text() == "{}"
    notes = [(source.sha256, source.note) for source in folder.manifest.sources]
    hashes = [WeightsFolder.open(f).manifest.files["weights.safetensors"].sha256 for f in pair]
    assert notes == [(hashes[0], f"share {1 - share:g}"), (hashes[1], f"share {share:g}")]


def test_pairs_that_were_not_made_alike_are_refused(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    new, whole = tmp_path / "new", torch.zeros(1)
    for more in ({"dit.b": whole}, {"dit.a": torch.ones(3, 2)}):
        name = f"other {len(more['dit.b'] if 'dit.b' in more else more['dit.a'])}"
        other = written(tmp_path / name, 1.0, **more)
        with pytest.raises(WeightsError, match=r"not hold the same tensors.*dit\.[ab]"):
            average(pair[0], other, new, 0.5)
    write_manifest(pair[1], load_preset("echo-tiny"), ["weights.safetensors"])
    with pytest.raises(WeightsError, match="weights of echo-tiny, not of published-small"):
        average(*pair, new, 0.5)
    assert not new.exists()


def test_the_command_refuses_a_share_and_a_folder_that_is_taken(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["weights", "average", *map(str, pair), str(tmp_path / "new")]
    assert main([*words, "--share", "1.5"]) == 2
    assert "share 1.5: give 0 (the first folder) to 1" in capsys.readouterr().err
    assert main(words) == 0
    assert "published-small, digest " in capsys.readouterr().out
    assert main(words) == 2
    assert "is a weights folder already" in capsys.readouterr().err
