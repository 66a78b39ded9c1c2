"""`echo-ray weights` from the command line: what it prints and what it returns."""

from __future__ import annotations

from pathlib import Path

import pytest
from converted import write_preset
from published import published_preset

from echo_ray.cli import main


@pytest.fixture
def preset(tmp_path: Path) -> str:
    write_preset(tmp_path / "preset", published_preset())
    return str(tmp_path / "preset")


def weights(*words: str | Path) -> int:
    return main(["weights", *map(str, words)])


def test_synthesize_verify_convert_verify(
    tmp_path: Path, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    src, dst, name = tmp_path / "src", tmp_path / "dst", ("--preset", preset)
    assert weights("synthesize", src, *name, "--seed", "3") == 0
    assert "google/umt5-xxl/tokenizer.json" in capsys.readouterr().out
    assert weights("verify", src, *name) == 0
    assert "these files convert" in capsys.readouterr().out
    assert weights("convert", src, dst, *name, "--ema", "--lora-alpha", "1") == 0
    said = capsys.readouterr().out
    assert "LoRA of rank 2, alpha 1, merged" in said
    assert "dit.safetensors" in said
    for words in (name, ()):
        assert weights("verify", dst, *words) == 0, "a converted folder knows its preset"
        assert "whole: published-small" in capsys.readouterr().out
    assert weights("verify", dst, "--preset", "echo-tiny") == 1


def test_verify_tells_reasons_and_returns_1(
    tmp_path: Path, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights("synthesize", tmp_path / "src", "--preset", preset, "--only", "dit, memory,codec")
    capsys.readouterr()
    assert weights("verify", tmp_path / "src", "--preset", preset) == 1
    assert "WRONG: " in (said := capsys.readouterr().err)
    assert "no text encoder" in said


def test_convert_refuses_with_2_before_it_opens_anything(
    tmp_path: Path, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weights("convert", tmp_path / "gone", tmp_path / "dst", "--preset", preset) == 2
    assert "weights_invalid" in capsys.readouterr().err
    (tmp_path / "taken" / "x").mkdir(parents=True)
    assert weights("convert", tmp_path / "gone", tmp_path / "taken", "--preset", preset) == 2
    assert "is not empty" in capsys.readouterr().err
    assert weights("convert", tmp_path, tmp_path / "dst", "--preset", "nonsense") == 2
    assert "nonsense" in capsys.readouterr().err


def test_a_pickle_with_code_is_refused_from_the_command_line_too(
    tmp_path: Path, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights("synthesize", tmp_path / "src", "--preset", preset)
    made = tmp_path / "made"
    code = f"cos\nmkdir\n(V{made}\ntR."
    (tmp_path / "src/echo_infinity.pt").write_bytes(b"\x80\x02" + code.encode())
    assert weights("convert", tmp_path / "src", tmp_path / "dst", "--preset", preset) == 2
    assert "nothing in it was executed" in capsys.readouterr().err
    assert not made.exists()
    assert not (tmp_path / "dst").exists()
