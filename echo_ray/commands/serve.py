"""`echo-ray serve`: the whole service on this machine, on a Ray of its own."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import logging
import os
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from echo_ray.commands.settings import add_settings

HELP = "run the service on this machine"
APPLICATION = "echo-ray"
BUILDER = "echo_ray.serve.app:build"
# Ray cannot live on 127.0.0.1 (its parts would look for each other at the outside address).
NODE_ADDRESS = "127.0.0.2"
# Frames never pass through Ray's object store, so it gets about the least that it accepts.
OBJECT_STORE_BYTES = 80 * 2**20
ADDRESS_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True)
class ServePlan:
    """What a Serve config file says, checked: the application's arguments and how it is sized."""

    args: Mapping[str, Any]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of a deployment, by its name."""

    @property
    def cpus(self) -> float:
        """Logical CPUs that its replicas ask Ray for."""
        return sum(
            _most(o) * float((o.get("ray_actor_options") or {}).get("num_cpus", 1))
            for o in self.options.values()
        )


def _most(options: Mapping[str, Any]) -> float:
    """How many replicas a deployment may come to have."""
    autoscaling = options.get("autoscaling_config") or {}
    return float(autoscaling.get("max_replicas") or options.get("num_replicas") or 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="a Ray Serve config file")
    add_settings(parser, "http.port=9000")


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM, then give every session up and leave."""
    plan = read_plan(args.config or default_config(), args.assignments)
    check_access(plan)
    check_storage(plan)
    print("starting ...", flush=True)
    try:
        with _ray(plan) as logs:
            url = _deploy(plan, logs)
            print(f"echo_ray serves at {url}   (logs: {logs}; Ctrl-C ends it)", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        print("stopped", flush=True)
    return 0


def default_config() -> Path:
    """The config file that comes with the package: `deployments/local.yaml`."""
    return Path(str(resources.files("echo_ray") / "commands" / "local.yaml"))


def read_plan(file: Path, assignments: Sequence[str] = ()) -> ServePlan:
    """Read a Serve config file and check everything that can be checked before Ray starts.

    Raises `ConfigError` for the file, a key or a value, or a port that is taken.
    """
    from echo_ray.config import EchoConfig, from_mapping, with_overrides
    from echo_ray.weights.location import check_model

    app = read_application(file)
    args = with_overrides(app.get("args") or {}, assignments)
    config = from_mapping(EchoConfig, args)
    check_model(config.model)
    options = _options(app.get("deployments") or [], file)
    check_port(config.http.host, config.http.port)
    return ServePlan(args, options)


def check_storage(plan: ServePlan) -> None:
    """Try the stores once, so that what is wrong with them is told of before Ray starts."""
    from echo_ray.clock import SystemClock
    from echo_ray.config import EchoConfig, from_mapping
    from echo_ray.storage.open import check_stores

    check_stores(from_mapping(EchoConfig, plan.args).storage, SystemClock())


def check_access(plan: ServePlan) -> None:
    """Look for every secret and table of tokens that the configuration names."""
    from echo_ray.clock import SystemClock
    from echo_ray.config import EchoConfig, from_mapping
    from echo_ray.serve import access

    access.check_access(from_mapping(EchoConfig, plan.args).access, SystemClock())


def check_port(host: str, port: int) -> None:
    """Raise `ConfigError` if the service could not listen there.

    Routers of one service share their port, so a second service would not notice by itself.
    """
    from echo_ray.errors import ConfigError

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            # Binding alone would pass beside a listener that also allows reuse.
            probe.listen(1)
    except OSError as e:
        taken = e.errno == errno.EADDRINUSE
        remedy = "take another, e.g. --set http.port=8001" if taken else "check http.host"
        why = "in use by another program" if taken else e.strerror or str(e)
        raise ConfigError(f"http.port: {host}:{port} is {why}; {remedy}", param="http.port") from e


def read_application(file: Path) -> Mapping[str, Any]:
    """The one application of a Serve config file. Raises `ConfigError`."""
    from echo_ray.config import read_yaml
    from echo_ray.errors import ConfigError

    apps = read_yaml(file).get("applications")
    if not isinstance(apps, list) or len(apps) != 1 or not isinstance(apps[0], dict):
        raise ConfigError(f"{file}: applications: expected a list of one; see deployments/")
    app: Mapping[str, Any] = apps[0]
    if app.get("import_path") != BUILDER:
        raise ConfigError(
            f"{file}: import_path: {app.get('import_path')!r} is not served here; use {BUILDER}"
        )
    if not isinstance(app.get("args") or {}, dict):
        raise ConfigError(f"{file}: args: expected a mapping, got {app['args']!r}")
    return app


def _options(deployments: object, file: Path) -> dict[str, Mapping[str, Any]]:
    from echo_ray.errors import ConfigError

    if not isinstance(deployments, list) or not all(
        isinstance(d, dict) and isinstance(d.get("name"), str) for d in deployments
    ):
        raise ConfigError(f"{file}: deployments: expected a list of mappings with a name")
    return {d["name"]: {k: v for k, v in d.items() if k != "name"} for d in deployments}


@contextlib.contextmanager
def _ray(plan: ServePlan) -> Iterator[Path]:
    """A Ray of this process's own; yields the folder of its logs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
    import ray
    from ray import serve

    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    _end_on_sigterm()
    context = ray.init(
        address="local",
        _node_ip_address=NODE_ADDRESS,
        include_dashboard=False,
        num_cpus=max(os.cpu_count() or 1, int(plan.cpus) + 1),
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    # Ray has put its own in place.
    _end_on_sigterm()
    try:
        yield Path(context.address_info["session_dir"]) / "logs"  # type: ignore[attr-defined]
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # Ray reports the end of its own parts as failures, from a thread that prints.
        with contextlib.redirect_stdout(io.StringIO()):
            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()


def _end_on_sigterm() -> None:
    """Make SIGTERM do what Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _deploy(plan: ServePlan, logs: Path) -> str:
    from ray import serve

    from echo_ray.errors import UnavailableError
    from echo_ray.serve.app import application

    app = application(plan.args, options=plan.options)
    serve.start(proxy_location="Disabled")
    try:
        serve.run(app, name=APPLICATION, route_prefix=None)
        return f"http://{_address(plan)}"
    except (RuntimeError, TimeoutError) as e:
        why = _first_failure() or str(e)
        raise UnavailableError(f"the service did not start: {why}\nIts logs are in {logs}") from e


def _address(plan: ServePlan) -> str:
    """Where the service listens: as configured, or as the router says if any port was free."""
    from ray import serve

    from echo_ray.config import EchoConfig, from_mapping

    http = from_mapping(EchoConfig, plan.args).http
    if http.port:
        return f"[{http.host}]:{http.port}" if ":" in http.host else f"{http.host}:{http.port}"
    router = serve.get_deployment_handle("Router", APPLICATION)
    address: str = router.address.remote().result(timeout_s=ADDRESS_LIMIT_S)
    return address


def _first_failure() -> str | None:
    """What a deployment that is not healthy says of itself, in one line."""
    from ray import serve

    app = serve.status().applications.get(APPLICATION)
    for name, deployment in app.deployments.items() if app else ():
        lines = [line.strip() for line in deployment.message.splitlines() if line.strip()]
        if deployment.status != "HEALTHY" and lines:
            # The last line of a traceback is the error itself.
            return f"{name}: {lines[-1]}"
    return None
