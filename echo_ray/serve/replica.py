"""GeneratorReplica: one device under Ray Serve. It places and restarts; the work is the host's."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import ray
from ray import serve

from echo_ray import __version__
from echo_ray.clock import Clock, SystemClock
from echo_ray.config import EchoConfig, ModelSection, from_mapping
from echo_ray.errors import ConfigError, UnavailableError
from echo_ray.serve.accounts import tell_store_calls
from echo_ray.serve.data_socket import DataSocket
from echo_ray.serve.door import Door
from echo_ray.serve.drain import NodeWatch, before_exit, stop_budget_s
from echo_ray.serve.host import SessionHost
from echo_ray.serve.telemetry import BOTH, REPLICAS, Telemetry, log_as_json
from echo_ray.serve.tracing import open_tracer
from echo_ray.session import demand, figures
from echo_ray.session.draining import Reason
from echo_ray.session.engine_port import Engine
from echo_ray.session.fingerprint import ResumePolicy
from echo_ray.storage.interface import Directory, SnapshotStore
from echo_ray.storage.open import open_directory, open_snapshots

ENGINE = "echo_ray.engine.build:build_engine"
WARM_UP_CHUNKS = 3
CLOSE_S = 5.0
"""How long a replica that stops waits for its sessions' chunks and snapshots."""
MARGIN_S = 3.0
"""Between the end of a replica's own farewell and the moment it would be killed."""
BuildEngine = Callable[[ModelSection], Engine]


def engine_factory(path: str) -> BuildEngine:
    """The function that `module:name` names. Raises `ConfigError`."""
    module, _, name = path.partition(":")
    try:
        return cast(BuildEngine, getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"engine_factory {path!r}: cannot be imported ({error}); write module:function"
        ) from error


class Generator:
    """One device with its sessions and its data socket: all of a replica but Ray."""

    def __init__(
        self,
        config: EchoConfig,
        *,
        replica_id: str,
        node_id: str,
        ip: str,
        build_engine: BuildEngine,
        directory: Callable[[], Directory],
        store: SnapshotStore,
        clock: Clock,
        warm_up_chunks: int = 0,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.telemetry = telemetry or Telemetry(REPLICAS + BOTH)
        self.telemetry.set("build_info", 1, version=__version__, role="generator")
        self._tracer = open_tracer(config.telemetry, replica_id, clock)
        self.host = SessionHost(
            replica_id=replica_id,
            node_id=node_id,
            pid=os.getpid(),
            build_engine=partial(build_engine, config.model),
            open_directory=directory,
            store=store,
            config=config,
            telemetry=self.telemetry,
            clock=clock,
            warm_up_chunks=warm_up_chunks,
            tracer=self._tracer,
        )
        self._socket = DataSocket(self.host)
        self._door = Door(self._socket.app, ip, config.http.replica_port)
        self.address = self._door.address
        self._leaving = threading.Lock()
        self._closed = False

    def start(self) -> None:
        """Open the door, then tell the directory."""
        self._door.start()
        self.host.start(self.address)

    def check(self) -> None:
        """Raise `UnavailableError` unless every thread lives and gets on."""
        if not (self._door.alive and self.host.alive()):
            raise UnavailableError(f"replica {self.host.replica_id!r}: a thread is dead or hangs")

    def figures(self) -> dict[str, float]:
        """What the number of replicas is decided by, as far as this one knows it."""
        host, session = self.host, self.host.config.session
        standing = figures.standing(
            host.record(),
            leaving=host.leaving,
            policy=ResumePolicy(session.resume_policy),
            slack_s=host.least_slack_s,
            chunk_s=host.engine.shape.chunk_s,
            lead_chunks=session.lead_chunks,
            limit=host.config.limits.sessions_per_replica,
        )
        return figures.figures(standing, demand.total(host.told, host.clock.monotonic()))

    def leave(self, within_s: float, timeout_s: float = CLOSE_S) -> None:
        """Have the sessions moved, give up the rest at a chunk boundary, then shut the door.

        Whoever asks meanwhile waits for the end of it; asked again, nothing happens.
        """
        with self._leaving:
            if self._closed:
                return
            self._closed = True
            self.host.leave(within_s, timeout_s)
            if self._tracer is not None:
                self._tracer.close()
            self._door.stop()
            self._socket.close()

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Give every session up at a chunk boundary, then shut the door."""
        self.leave(0.0, timeout_s)

    def abandon(self) -> None:
        """Stop without a word, as a process that dies: nothing is released."""
        self._door.stop()
        self._socket.close()
        self.host.stop()


@serve.deployment(
    num_replicas=1,
    ray_actor_options={"num_cpus": 1},
    health_check_period_s=1.0,
    health_check_timeout_s=3.0,
    graceful_shutdown_timeout_s=30.0,
    graceful_shutdown_wait_loop_s=0.2,
)
class GeneratorReplica:
    """The Serve deployment. `companions` are deployments that belong to the application."""

    def __init__(
        self,
        config: Mapping[str, Any],
        *companions: object,
        engine: str = ENGINE,
        warm_up_chunks: int = WARM_UP_CHUNKS,
    ) -> None:
        settings = from_mapping(EchoConfig, config)
        clock = SystemClock()
        telemetry = Telemetry(REPLICAS + BOTH)
        log_as_json()
        node_id = ray.get_runtime_context().get_node_id()
        self._drain_s = settings.session.drain_s
        self._generator = Generator(
            settings,
            replica_id=serve.get_replica_context().replica_tag,
            node_id=node_id,
            ip=ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
            build_engine=engine_factory(engine),
            directory=lambda: open_directory(settings.storage, clock),
            store=open_snapshots(settings.storage, tell_store_calls(telemetry)),
            clock=clock,
            warm_up_chunks=warm_up_chunks,
            telemetry=telemetry,
        )
        self._generator.start()
        self._watch = NodeWatch(node_id, self._node_drains, clock)
        self._watch.start()
        before_exit(partial(self._generator.leave, self._drain_s))

    def _node_drains(self, left_s: float | None) -> None:
        within_s = self._drain_s if left_s is None else within(left_s, left_s)
        self._generator.host.drain(Reason.NODE, within_s)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve where it scales this deployment: what its policy goes by."""
        return self._generator.figures()

    def check_health(self) -> None:
        """Called by Serve; raises when this replica should be replaced."""
        self._generator.check()

    def __del__(self) -> None:
        # Not there if the constructor failed.
        generator = getattr(self, "_generator", None)
        if generator is not None:
            generator.leave(within(self._drain_s, stop_budget_s()))


def within(drain_s: float, killed_after_s: float | None) -> float:
    """How long sessions may be moved by a replica that is killed after so many seconds."""
    if killed_after_s is None:
        return drain_s
    return max(0.0, min(drain_s, killed_after_s - CLOSE_S - MARGIN_S))
