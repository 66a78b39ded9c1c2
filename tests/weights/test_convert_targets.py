"""Where a conversion writes to: all of it arrives, or the place stays as it was."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from published import change, published_preset

from echo_ray.errors import WeightsError
from echo_ray.weights import convert as conversion
from echo_ray.weights import writer
from echo_ray.weights.convert import convert
from echo_ray.weights.folder import WeightsFolder
from echo_ray.weights.plan import make_plan

PRESET = published_preset()


def converted(src: Path) -> str:
    """Convert into the folder beside, and give the digest."""
    return convert(make_plan(src, PRESET), src.parent / "dst").digest


def test_values_that_are_not_finite_leave_no_folder(src: Path, tmp_path: Path) -> None:
    change(src / "Wan2.1_VAE.pth", lambda d: d["conv1.bias"].fill_(float("nan")))
    with pytest.raises(WeightsError, match=r"codec\.conv1\.bias: holds values that are not finite"):
        convert(make_plan(src, PRESET), tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_an_interrupted_conversion_leaves_no_folder(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = writer.write_file
    written: list[Path] = []

    def interrupted(file: Path, *args: Any) -> object:
        if written:
            raise KeyboardInterrupt
        written.append(file)
        return write(file, *args)

    monkeypatch.setattr(conversion, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(make_plan(src, PRESET), tmp_path / "dst")
    assert written
    assert not (tmp_path / "dst").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(KeyboardInterrupt):
        convert(make_plan(src, PRESET), tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_failed_overwrite_leaves_the_old_folder_whole(
    src: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = converted(src)
    change(src / "taew2_1.pth", lambda d: d["decoder.1.bias"].fill_(float("inf")))
    with pytest.raises(WeightsError, match="not finite"):
        convert(make_plan(src, PRESET), src.parent / "dst", overwrite=True)
    folder = WeightsFolder.open(src.parent / "dst")
    assert folder.digest == before
    folder.part("dit")
    assert not list((src.parent / "dst").glob(".partial*"))


def test_overwriting_replaces_every_file_of_the_old_folder(src: Path) -> None:
    before = converted(src)
    (src / "taew2_1.pth").unlink()
    dst = src.parent / "dst"
    (dst / ".partial-x").mkdir()
    convert(make_plan(src, PRESET, dtype="bfloat16"), dst, overwrite=True)
    folder = WeightsFolder.open(dst)
    assert folder.digest != before
    held = {"codec", "dit", "memory", "text"}
    assert {path.stem for path in dst.glob("*.safetensors")} == held
    assert not (dst / ".partial-x").exists()


def test_a_taken_target_is_refused(src: Path, tmp_path: Path) -> None:
    plan = make_plan(src, PRESET)
    converted(src)
    with pytest.raises(WeightsError, match="is a weights folder already; --overwrite"):
        convert(plan, tmp_path / "dst")
    with pytest.raises(WeightsError, match="is not empty, and not a weights folder either"):
        convert(plan, src, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="is a file"):
        convert(plan, tmp_path / "file")
    (tmp_path / "rest" / ".partial-abc").mkdir(parents=True)
    with pytest.raises(WeightsError, match="unfinished conversion; --overwrite"):
        convert(plan, tmp_path / "rest")
    convert(plan, tmp_path / "rest", overwrite=True)


def test_a_full_disk_is_told_before_anything_is_written(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    plan = make_plan(src, PRESET)
    needed = conversion.plan_bytes(plan)
    asked = []

    def disk_usage(place: Path) -> object:
        asked.append(place)
        return usage(10**9, 0, needed - 1)

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    with pytest.raises(WeightsError, match=r"the disk is too full: .* are needed and .* are free"):
        convert(plan, tmp_path / "new" / "dst")
    assert asked == [tmp_path]
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> object:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "write_file", full)
    with pytest.raises(WeightsError, match="conversion failed: No space left on device"):
        convert(make_plan(src, PRESET), tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
