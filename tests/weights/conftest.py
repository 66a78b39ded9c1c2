"""Published files of a scaled-down model, made once and copied for every test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from published import published_preset

from echo_ray.weights.synthetic import synthesize


@pytest.fixture(scope="session")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "src"
    synthesize(published_preset(), folder, seed=5)
    return folder


@pytest.fixture
def src(untouched: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(untouched, tmp_path / "src"))
