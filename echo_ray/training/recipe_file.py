"""Recipes from TOML files: found by path or packaged name, read strictly.

A section `[cache]` changes the preset's cache; what it does not name stays as it is.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from echo_ray.config import from_mapping, with_overrides
from echo_ray.errors import ConfigError
from echo_ray.preset import CacheShape, load_preset, preset_folder
from echo_ray.training.recipe import (
    STAGES,
    CodecRecipe,
    FewstepRecipe,
    PretrainRecipe,
    Recipe,
    StreamingRecipe,
    TeacherRecipe,
    VideoRecipe,
)

CONFIGS = Path(str(resources.files("echo_ray") / "training" / "configs"))
OUT, PRESET = "{out}", "{preset}"
"""Stand for the run's folder, and the preset's own, in the folders that a recipe names."""

V = TypeVar("V", bound=VideoRecipe)


def find_recipes(name: str) -> list[Path]:
    """The file of that name, or all of a folder, in the order of their stages and names.

    A name that is no path is looked for among the packaged recipes. Raises `ConfigError`.
    """
    for path in (Path(name), CONFIGS / f"{name}.toml", CONFIGS / name):
        if path.is_file():
            return [path]
        files = sorted(path.glob("*.toml")) if path.is_dir() else []
        if files:
            stages = {file: STAGES.index(_stage(_read(file), file)) for file in files}
            return sorted(files, key=lambda file: (stages[file], file.name))
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
            return _video_recipe(TeacherRecipe, data)
        case "pretrain":
            return _video_recipe(PretrainRecipe, data)
        case "fewstep":
            return _video_recipe(FewstepRecipe, data)
        case _:
            return _video_recipe(StreamingRecipe, data)


def _video_recipe(kind: type[V], data: Mapping[str, Any]) -> V:
    """The recipe with a whole cache, if its file names any part of one."""
    recipe = from_mapping(kind, {k: v for k, v in data.items() if k != "cache"})
    if data.get("cache") is None:
        return recipe
    preset = load_preset(recipe.preset)
    cache = from_mapping(CacheShape, _changed(asdict(preset.cache), data["cache"]), "cache")
    # Built once here, so that a cache that no preset can have is refused before anything begins.
    changed = replace(preset, cache=cache)
    return replace(recipe, cache=changed.cache)


def _changed(values: object, changes: object) -> object:
    """The changes, and the values where they say nothing."""
    if not isinstance(values, Mapping) or not isinstance(changes, Mapping):
        return changes
    return {**values, **{k: _changed(values.get(k), v) for k, v in changes.items()}}


def named_folder(text: str, out: Path, preset: str) -> Path:
    """A folder that a recipe names, with the run's and the preset's folder in their places.

    Raises `ModelUnknown` where the preset's is asked for and there is none.
    """
    if PRESET in text:
        text = text.replace(PRESET, str(preset_folder(preset)))
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
