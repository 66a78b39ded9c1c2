"""The Ray Serve application: routers in front, generator replicas behind. One screen, no more.

    serve deploy deployments/local.yaml  ->  build(args)  ->  GeneratorReplica x n + Router x m

Routers and replicas find each other through the session directory, not through Serve, so the graph
says only that they belong together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from ray.serve import Application, Deployment

from echo_ray.config import EchoConfig, ModelSection, from_mapping
from echo_ray.config_access import AccessSection
from echo_ray.errors import ConfigError
from echo_ray.preset import PRESETS, load_preset, preset_folder, with_codec
from echo_ray.serve.replica import ENGINE, GeneratorReplica
from echo_ray.serve.router import Router
from echo_ray.serve.scaling import check_policy
from echo_ray.serve.tracing import check_tracing


def build(args: Mapping[str, Any]) -> Application:
    """The application of a Serve config file; `args` is the configuration tree as plain data.

    Raises `ConfigError` for a key or a value that cannot be, `ModelUnknown` for the preset.
    """
    return application(args)


def application(
    args: Mapping[str, Any],
    *,
    engine: str = ENGINE,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Application:
    """The same with another engine behind the replicas: `engine` is `module:function`.

    `options`: the `deployments` of a Serve config file by name, where no Serve reads that file.
    """
    config = from_mapping(EchoConfig, args)
    with_codec(load_preset(config.model.preset), config.model.vae)
    check_tracing(config.telemetry)
    if config.storage.backend == "memory":
        raise ConfigError(
            "storage.backend: 'memory' is seen by one process only and a service has several; "
            "use local",
            param="storage.backend",
        )
    # Replicas are processes with working directories of their own; a folder must be one for all.
    storage = {**args.get("storage", {}), "path": _absolute(config.storage.path)}
    model = {**args.get("model", {}), **_located(config.model)}
    access = {**args.get("access", {}), **_access_files(config.access)}
    plain = {**args, "storage": storage, "model": model, "access": access}
    # Serve deploys what its root binds, so the one is handed to the other, which ignores it.
    sized = _sized(options or {})
    router = sized["Router"].bind(plain)
    return sized["GeneratorReplica"].bind(plain, router, engine=engine)


def _located(model: ModelSection) -> dict[str, str]:
    """The folders that a model section names, absolute; packaged presets keep their names."""
    found = {}
    if model.weights is not None:
        found["weights"] = _absolute(model.weights)
    if preset_folder(model.preset).parent != PRESETS:
        found["preset"] = _absolute(model.preset)
    return found


def _access_files(section: AccessSection) -> dict[str, Any]:
    """The files that the section `access` names, absolute."""
    named = ("tokens_file", "viewer_secret_file", "replica_secret_file")
    files = ((name, getattr(section, name)) for name in named)
    found: dict[str, Any] = {name: _absolute(file) for name, file in files if file is not None}
    if section.jwt.jwks is not None and "://" not in section.jwt.jwks:
        found["jwt"] = {**asdict(section.jwt), "jwks": _absolute(section.jwt.jwks)}
    return found


def _absolute(folder: str) -> str:
    return str(Path(folder).expanduser().absolute())


def _sized(options: Mapping[str, Mapping[str, Any]]) -> dict[str, Deployment]:
    """Both deployments by name, with their options."""
    sized = {d.name: d for d in (_deployment(Router), _deployment(GeneratorReplica))}
    for name, chosen in options.items():
        if name not in sized:
            raise ConfigError(f"deployments: {name!r} is unknown; known: {', '.join(sized)}")
        check_policy(chosen)
        try:
            sized[name] = sized[name].options(**chosen)
        except (TypeError, ValueError) as e:
            raise ConfigError(f"deployments: {name}: {e}", param=name) from e
    return sized


def _deployment(decorated: object) -> Deployment:
    """What `serve.deployment` makes of a class; type checkers still see the class."""
    return cast(Deployment, decorated)
