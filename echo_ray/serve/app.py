"""The Ray Serve application: routers in front, generator replicas behind. One screen, no more.

    serve deploy deployments/local.yaml  ->  build(args)  ->  GeneratorReplica x n + Router x m

Routers and replicas find each other through the session directory, not through Serve, so the graph
says only that they belong together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from ray.serve import Application, Deployment

from echo_ray.config import EchoConfig, from_mapping
from echo_ray.errors import ConfigError
from echo_ray.preset import load_preset
from echo_ray.serve.replica import ENGINE, GeneratorReplica
from echo_ray.serve.router import Router


def build(args: Mapping[str, Any]) -> Application:
    """The application of a Serve config file; `args` is the configuration tree as plain data.

    Raises `ConfigError` for a key or a value that cannot be, `ModelUnknown` for the preset.
    """
    return application(args)


def application(args: Mapping[str, Any], *, engine: str = ENGINE) -> Application:
    """The same with another engine behind the replicas: `engine` is `module:function`."""
    config = from_mapping(EchoConfig, args)
    load_preset(config.model.preset)
    if config.storage.backend == "memory":
        raise ConfigError(
            "storage.backend: 'memory' is seen by one process only and a service has several; "
            "use local",
            param="storage.backend",
        )
    # Replicas are processes with working directories of their own; the folder must be one.
    path = Path(config.storage.path).expanduser().absolute()
    plain = {**args, "storage": {**args.get("storage", {}), "path": str(path)}}
    # Serve deploys what its root binds, so the one is handed to the other, which ignores it.
    router = _deployment(Router).bind(plain)
    return _deployment(GeneratorReplica).bind(plain, router, engine=engine)


def _deployment(decorated: object) -> Deployment:
    """What `serve.deployment` makes of a class; type checkers still see the class."""
    return cast(Deployment, decorated)
