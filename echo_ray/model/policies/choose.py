"""From a cache shape's policy name to the policy."""

from __future__ import annotations

from echo_ray.errors import ConfigError
from echo_ray.model.policies.absolute import AbsolutePolicy
from echo_ray.model.policies.echo import EchoPolicy
from echo_ray.model.policies.policy import CachePolicy
from echo_ray.model.policies.window import WindowPolicy
from echo_ray.preset import CacheShape


def choose_policy(cache: CacheShape) -> CachePolicy:
    """The policy that `cache.policy` names: echo, absolute or window. Raises `ConfigError`."""
    match cache.policy:
        case "echo":
            return EchoPolicy(cache.position_limit)
        case "absolute":
            return AbsolutePolicy()
        case "window" if cache.memory is None:
            return WindowPolicy()
        case "window":
            raise ConfigError("cache.memory: the window policy has no memory tier; remove it")
    raise ConfigError(
        f"cache.policy: {cache.policy!r} is unknown; choose echo, absolute or window",
        param="cache.policy",
    )
