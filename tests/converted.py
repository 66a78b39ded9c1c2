"""A scaled-down published model on disk: its preset's folder, and weights that were converted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from published import published_preset

from echo_ray.preset import Preset
from echo_ray.weights.convert import convert
from echo_ray.weights.plan import make_plan
from echo_ray.weights.synthetic import synthesize


@dataclass(frozen=True, slots=True)
class Converted:
    """Folders as `model.preset` and `model.weights` name them."""

    preset: Path
    weights: Path


def converted_model(folder: Path, point_every: int = 2, dtype: str = "float32") -> Converted:
    """Synthesize published files, convert them, and write the preset beside."""
    preset = published_preset(dtype=dtype)
    preset = replace(preset, cache=replace(preset.cache, point_every=point_every))
    synthesize(preset, folder / "published", seed=3)
    convert(make_plan(folder / "published", preset), folder / "weights")
    write_preset(folder / "preset", preset)
    return Converted(folder / "preset", folder / "weights")


def write_preset(folder: Path, preset: Preset) -> None:
    """`preset.toml` with everything that the preset says."""
    folder.mkdir(parents=True)
    lines = list(_lines((), asdict(preset)))
    (folder / "preset.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _lines(path: tuple[str, ...], section: dict[str, Any]) -> list[str]:
    plain = {k: v for k, v in section.items() if v is not None and not isinstance(v, dict)}
    lines = [f"[{'.'.join(path)}]"] if path else []
    lines += [f"{key} = {_value(value)}" for key, value in plain.items()]
    for key, value in section.items():
        if isinstance(value, dict):
            lines += _lines((*path, key), value)
    return lines


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(_value(v) for v in value)}]"
    return f'"{value}"' if isinstance(value, str) else repr(value)
