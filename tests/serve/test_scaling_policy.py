"""Serve's policy: what it makes of what replicas push, and that nothing makes it raise."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import FakeClock
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve._private.config import DeploymentConfig
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from echo_ray.errors import ConfigError
from echo_ray.serve import scaling as policies
from echo_ray.serve.app import application
from echo_ray.serve.scaling import COMPLAIN_S, DECIDE_S, SILENT_S, SessionScaling, check_policy
from echo_ray.session.demand import Demand
from echo_ray.session.figures import figures
from echo_ray.session.scaling import Standing

HERE = DeploymentID(name="GeneratorReplica", app_name="echo-ray")
POLICY = "echo_ray.serve.scaling:SessionScaling"
Numbers = dict[str, float]


def said(sessions: int, demand: Demand | None = None, slots: int = 5) -> Numbers:
    standing = Standing(id="", sessions=sessions, slots=slots, slack_chunks=3.0)
    return figures(standing, demand or Demand())


def context(*pushed: Numbers, at_s: float = 0.0, target: int | None = None) -> AutoscalingContext:
    """What Serve hands over when each of these replicas has pushed twice."""
    ids = [ReplicaID(unique_id=f"r{n}", deployment_id=HERE) for n in range(len(pushed))]
    raw: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
    for replica_id, numbers in zip(ids, pushed, strict=True):
        for name, value in numbers.items():
            old = TimeStampedValue(timestamp=at_s - 1, value=0.0)
            new = TimeStampedValue(timestamp=at_s, value=value)
            raw.setdefault(name, {})[replica_id] = [old, new]
    return AutoscalingContext(
        deployment_id=HERE,
        deployment_name=HERE.name,
        app_name=HERE.app_name,
        current_num_replicas=len(ids),
        target_num_replicas=len(ids) if target is None else target,
        running_replicas=ids,
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics=None,
        raw_metrics=lambda: raw,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=AutoscalingConfig(min_replicas=1, max_replicas=8, metrics_interval_s=2),
    )


def policy(**rules: Any) -> tuple[SessionScaling, FakeClock]:
    made, clock = SessionScaling(**{"stable_s": 60, "settle_s": 1, **rules}), FakeClock()
    made.clock = clock
    return made, clock


def test_the_newest_push_of_each_replica_counts() -> None:
    assert policy()[0](context(said(3), said(3))) == (2, {})
    assert policy()[0](context(said(4), said(5))) == (3, {})
    waiting = said(3, Demand(watched=10))
    assert policy()[0](context(waiting, said(3)))[0] == 4
    assert policy(spare_slots=20)[0](context(said(0)))[0] == 4


def test_what_routers_told_different_replicas_is_one_demand() -> None:
    each = said(2, Demand(watched=3, unwatched=6))
    # 4 that run, 6 that are watched and 6 that are not, and 2 spare.
    assert policy()[0](context(each, each))[0] == 4


def test_between_two_decisions_the_number_stays() -> None:
    made, clock = policy()
    assert made(context(said(5)))[0] == 2
    assert made(context(said(1)))[0] == 2
    clock.advance(DECIDE_S)
    assert made(context(said(1)))[0] == 1


def test_a_replica_that_pushes_nothing_new_is_not_heard() -> None:
    made, clock = policy()
    for second in range(200):
        clock.advance(1.0)
        # One of them is stuck.
        stuck = context(said(1), said(0), said(0), at_s=float(second))
        for series in stuck.raw_metrics.values():
            (silent,) = (r for r in series if r.unique_id == "r2")
            series[silent] = [TimeStampedValue(timestamp=0.0, value=series[silent][-1].value)]
        wanted = made(stuck)[0]
        assert wanted == 3
    made, clock = policy()
    for second in range(62):
        clock.advance(1.0)
        wanted = made(context(said(1), said(0), said(0), at_s=float(second)))[0]
    assert wanted == 2
    assert SILENT_S < 60


def test_without_a_push_the_number_stays() -> None:
    made, clock = policy()
    half = {name: value for name, value in said(9).items() if name != "slots"}
    nonsense = said(9) | {"leaving": 7.0}
    for pushed in ((), ({},), (half,), (nonsense,)):
        clock.advance(DECIDE_S)
        assert made(context(*pushed, target=4))[0] == 4


@pytest.fixture
def errors() -> Iterator[list[str]]:
    """What goes to the log of Serve's controller."""
    logger, found = logging.getLogger("ray.serve"), logging.Handler(logging.ERROR)
    messages: list[str] = []
    found.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(found)
    yield messages
    logger.removeHandler(found)


def test_a_policy_that_fails_keeps_the_number_and_says_so_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, errors: list[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(policies, "decide", broken)
    made, clock = policy()
    for _ in range(30):
        assert made(context(said(5), target=3)) == (3, {})
        clock.advance(1.0)
    (message,) = errors
    assert message.endswith("keeps the present number of replicas: RuntimeError('no luck')")
    clock.advance(COMPLAIN_S)
    made(context(said(5), target=3))
    assert errors == [message, message]


WRONG = [
    ({"spare_slots": 0}, r"policy_kwargs\.spare_slots: 0 is not allowed: 1 to 1000"),
    ({"spare": 2}, r"policy_kwargs\.spare: unknown; known: spare_slots, "),
]


@pytest.mark.parametrize(("rules", "says"), WRONG)
def test_wrong_rules_are_refused_before_the_start(rules: dict[str, Any], says: str) -> None:
    options = {
        "autoscaling_config": {"policy": {"policy_function": POLICY, "policy_kwargs": rules}}
    }
    with pytest.raises(ConfigError, match=says):
        check_policy(options)
    with pytest.raises(ConfigError, match=says):
        application({}, options={"GeneratorReplica": options})
    # What is no policy of ours is Serve's to refuse.
    options["autoscaling_config"]["policy"]["policy_function"] = "other.module:policy"
    check_policy(options)
    check_policy({"autoscaling_config": None})


@pytest.mark.parametrize(("rules", "says"), WRONG)
def test_where_serve_makes_it_wrong_rules_keep_the_number(
    rules: dict[str, Any], says: str, errors: list[str]
) -> None:
    assert SessionScaling(**rules)(context(said(5), target=3)) == (3, {})
    (message,) = errors
    assert re.search(says, message)


def test_it_survives_the_way_that_serve_ships_it() -> None:
    chosen = AutoscalingConfig(
        max_replicas=8, policy={"policy_function": POLICY, "policy_kwargs": {"spare_slots": 3}}
    )
    shipped = DeploymentConfig.from_default(autoscaling_config=chosen).to_proto_bytes()
    arrived = DeploymentConfig.from_proto_bytes(shipped).autoscaling_config
    assert arrived is not None
    made = arrived.policy.get_policy()(**arrived.policy.policy_kwargs)
    assert made(context(said(3)))[0] == 2
