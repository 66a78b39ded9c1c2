"""How many replicas Serve has: its policy, which runs in Serve's controller, and what it goes by.

    routers -> a replica (`/v1/demand`) -> `record_autoscaling_stats` -> Serve -> `SessionScaling`

The controller asks no store and no replica: replicas push a few numbers to it. The decision is
`session/scaling.py`. Serve ships this module by value, so it keeps no state of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ray.serve.config import AutoscalingContext

from echo_ray.clock import Clock, SystemClock
from echo_ray.errors import ConfigError
from echo_ray.session import demand, figures
from echo_ray.session.scaling import Decision, Fleet, Rules, Standing, State, decide

DECIDE_S = 1.0
"""Serve asks ten times a second; the number is thought about this often."""
SILENT_S = 10.0
"""A replica that pushes nothing new for so long, or three times Serve's interval, is not heard."""
COMPLAIN_S = 60.0
POLICY = "SessionScaling"


class SessionScaling:
    """Serve's policy for the replicas, with the options of `Rules`. It never raises.

    Where Serve makes it, an error would be tried again for ever and seen by nobody: then, and
    whenever deciding fails, the present number stays and the log says why.
    """

    def __init__(self, **rules: Any) -> None:
        self.clock: Clock = SystemClock()
        self._state = State()
        self._stamps: dict[str, tuple[float, float]] = {}
        self._decided_s: float | None = None
        self._wanted = 0
        self._complained_s: float | None = None
        self._rules: Rules | ConfigError
        try:
            self._rules = rules_of(rules)
        except ConfigError as error:
            self._rules = error

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas to have, and nothing for Serve to remember."""
        try:
            return self._decide(context), {}
        except Exception as error:
            self._complain(error)
            return context.target_num_replicas, {}

    def _decide(self, context: AutoscalingContext) -> int:
        if isinstance(self._rules, ConfigError):
            raise self._rules
        now_s = self.clock.monotonic()
        if self._decided_s is None or now_s - self._decided_s >= DECIDE_S:
            self._decided_s = now_s
            # If this fails, the present number is what holds until the next time.
            self._wanted = context.target_num_replicas
            decision = decide(self._state, self._look(context, now_s), now_s, self._rules)
            self._tell(context, decision)
            self._state, self._wanted = decision.state, decision.wanted
        return self._wanted

    def _look(self, context: AutoscalingContext, now_s: float) -> Fleet:
        """The fleet as Serve knows it, from what replicas pushed."""
        heard: list[Standing] = []
        told: list[demand.Demand] = []
        pushed = _newest(context.raw_metrics or {})
        silent_s = max(SILENT_S, 3 * float(getattr(context.config, "metrics_interval_s", 0)))
        running = {str(r.unique_id) for r in context.running_replicas}
        self._stamps = {rid: stamp for rid, stamp in self._stamps.items() if rid in running}
        for replica_id in running & pushed.keys():
            stamp, numbers = pushed[replica_id]
            if self._stamps.get(replica_id, (None, 0.0))[0] != stamp:
                self._stamps[replica_id] = (stamp, now_s)
            if now_s - self._stamps[replica_id][1] > silent_s:
                continue
            try:
                standing, said = figures.read(replica_id, numbers)
            except (KeyError, ValueError):
                # It has just begun to push, or is of another release.
                continue
            heard.append(standing)
            told += [] if said is None else [said]
        return Fleet(
            target=context.target_num_replicas,
            heard=tuple(heard),
            unheard=len(running) - len(heard),
            demand=demand.together(told),
            least=context.capacity_adjusted_min_replicas,
            most=context.capacity_adjusted_max_replicas,
        )

    def _tell(self, context: AutoscalingContext, decision: Decision) -> None:
        if decision.wanted != context.target_num_replicas:
            _log().info(
                "%s: %d replicas instead of %d: %s",
                context.deployment_name,
                decision.wanted,
                context.target_num_replicas,
                decision.why,
            )

    def _complain(self, error: Exception) -> None:
        now_s = self.clock.monotonic()
        if self._complained_s is None or now_s - self._complained_s >= COMPLAIN_S:
            self._complained_s = now_s
            why = error.message if isinstance(error, ConfigError) else repr(error)
            _log().error("%s keeps the present number of replicas: %s", POLICY, why)


def rules_of(given: Mapping[str, Any]) -> Rules:
    """The rules that `policy_kwargs` say. Raises `ConfigError`."""
    known = Rules.__slots__
    for name in given:
        if name not in known:
            raise ConfigError(
                f"policy_kwargs.{name}: unknown; known: {', '.join(known)}", param="policy_kwargs"
            )
    return Rules(**given)


def check_policy(options: Mapping[str, Any]) -> None:
    """Refuse options of a deployment that this policy could not follow, with `ConfigError`."""
    autoscaling = options.get("autoscaling_config")
    policy = autoscaling.get("policy") if isinstance(autoscaling, Mapping) else None
    if isinstance(policy, Mapping) and str(policy.get("policy_function")).endswith(POLICY):
        rules_of(policy.get("policy_kwargs") or {})


def _newest(raw: Mapping[str, Mapping[Any, Any]]) -> dict[str, tuple[float, dict[str, float]]]:
    """Replica id -> (when, name -> number) of its newest push."""
    found: dict[str, tuple[float, dict[str, float]]] = {}
    for name, series_of in raw.items():
        for replica, series in series_of.items():
            if series:
                at_s, numbers = found.setdefault(str(replica.unique_id), (0.0, {}))
                numbers[name] = series[-1].value
                found[str(replica.unique_id)] = (max(at_s, series[-1].timestamp), numbers)
    return found


def _log() -> logging.Logger:
    """Serve's own, for it is the one that the controller writes down."""
    return logging.getLogger("ray.serve")
