"""Rules of the house that no linter knows."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("echo_ray/**/*.py"), *ROOT.glob("kernels/**/*.py")])
LINE_LIMIT = 400
ROOMS = {
    ".ci", "deployments", "docs", "echo_ray", "helm", "infra", "kernels", "tests",
}  # fmt: skip

STEP_PATH = sorted([*ROOT.glob("echo_ray/model/**/*.py"), *ROOT.glob("echo_ray/engine/*.py")])
HOST_READS = re.compile(r"\.item\(\)|\.cpu\(\)|\bprint\(|torch\.cuda\.synchronize")


def tracked() -> list[str]:
    out = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return out.stdout.splitlines()


def test_there_are_sources_to_look_at() -> None:
    assert len(SOURCES) > 40
    assert len(STEP_PATH) > 12


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_source_file_is_too_long(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LINE_LIMIT


def test_no_host_reads_in_the_step_path() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{n}: {line.strip()}"
        for file in STEP_PATH
        for n, line in enumerate(file.read_text().splitlines(), 1)
        if HOST_READS.search(line)
    ]
    assert found == []


def test_geometry_is_never_a_literal() -> None:
    literal = re.compile(r"\b(1560|4680|14040|18720|23400|32760)\b")
    found = [f.name for f in SOURCES if literal.search(f.read_text())]
    assert found == []


def test_every_room_has_a_door_plate() -> None:
    for folder in {f.parent for f in SOURCES}:
        plate = folder / "__init__.py"
        if folder.name in ("player", "presets", "kernels"):
            continue
        assert plate.is_file(), f"{folder} has no __init__.py"
        assert plate.read_text().startswith('"""'), f"{plate} does not say what lives there"


def test_nothing_unknown_at_the_top() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    top = {Path(f).parts[0] for f in tracked() if len(Path(f).parts) > 1}
    assert top <= ROOMS


def test_folders_beside_packages_are_not_importable() -> None:
    for name in ("kernels", "deployments", "infra", "helm"):
        assert not (ROOT / name / "__init__.py").exists()
