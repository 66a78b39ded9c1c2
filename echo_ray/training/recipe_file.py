"""Recipes from TOML files: found by path or packaged name, read strictly."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from echo_ray.config import from_mapping, with_overrides
from echo_ray.errors import ConfigError
from echo_ray.training.recipe import (
    STAGES,
    CodecRecipe,
    FewstepRecipe,
    PretrainRecipe,
    Recipe,
    StreamingRecipe,
    TeacherRecipe,
)

CONFIGS = Path(str(resources.files("echo_ray") / "training" / "configs"))
OUT = "{out}"
"""Stands for the run's folder in the folders that a recipe names."""


def find_recipes(name: str) -> list[Path]:
    """The file of that name, or all of a folder, in the order of their stages.

    A name that is no path is looked for among the packaged recipes. Raises `ConfigError`.
    """
    for path in (Path(name), CONFIGS / f"{name}.toml", CONFIGS / name):
        if path.is_file():
            return [path]
        files = sorted(path.glob("*.toml")) if path.is_dir() else []
        if files:
            return sorted(files, key=lambda file: STAGES.index(_stage(_read(file), file)))
    known = sorted(str(f.relative_to(CONFIGS).with_suffix("")) for f in CONFIGS.rglob("*.toml"))
    raise ConfigError(
        f"recipe {name!r} is neither a TOML file, a folder of such, nor one of {', '.join(known)}",
        param="--config",
    )


def read_recipe(file: Path, assignments: Sequence[str] = ()) -> Recipe:
    """Read one stage's recipe, with `a.b=c` assignments applied. Raises `ConfigError`."""
    data = with_overrides(_read(file), assignments)
    match _stage(data, file):
        case "codec":
            return from_mapping(CodecRecipe, data)
        case "teacher":
            return from_mapping(TeacherRecipe, data)
        case "pretrain":
            return from_mapping(PretrainRecipe, data)
        case "fewstep":
            return from_mapping(FewstepRecipe, data)
        case _:
            return from_mapping(StreamingRecipe, data)


def named_folder(text: str, out: Path) -> Path:
    """A folder that a recipe names, with the run's folder in its place."""
    return Path(text.replace(OUT, str(out)))


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{file}: cannot be read as a recipe: {e}") from e


def _stage(data: dict[str, Any], file: Path) -> str:
    stage = data.get("stage")
    if stage not in STAGES:
        raise ConfigError(
            f"{file}: stage: {stage!r} is not allowed: one of {', '.join(STAGES)}", param="stage"
        )
    return str(stage)
