"""What the sections of the configuration are checked with."""

from __future__ import annotations

from echo_ray.errors import ConfigError


def require(condition: bool, path: str, value: object, rule: str) -> None:
    """Raise `ConfigError` naming the key, its value and the rule it breaks."""
    if not condition:
        raise ConfigError(f"{path}: {value!r} is not allowed: {rule}", param=path)
