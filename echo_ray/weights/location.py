"""Where the weights of a configured model lie; looks at names only and loads nothing."""

from __future__ import annotations

from pathlib import Path

from echo_ray.config import ModelSection
from echo_ray.errors import ConfigError
from echo_ray.preset import load_preset, preset_folder, with_codec
from echo_ray.weights.manifest import FILE, read_manifest


def weights_folder(config: ModelSection) -> Path:
    """The configured folder, or the preset's own. Raises `ConfigError` if it has none."""
    if config.weights is not None:
        return Path(config.weights)
    inside = preset_folder(config.preset)
    if not (inside / FILE).is_file():
        raise ConfigError(
            f"model.weights: preset {config.preset} comes without weights; name the folder that "
            "echo-ray weights convert wrote (docs/models.md)",
            param="model.weights",
        )
    return inside


def check_model(config: ModelSection) -> None:
    """Raise what loading this model would raise, as far as a glance at the manifest can tell."""
    with_codec(load_preset(config.preset), config.vae)
    read_manifest(weights_folder(config))
