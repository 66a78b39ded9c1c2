"""Deploys the service on a Ray that runs already and leaves: `python -m chaos.deploy PLAN`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from echo_ray.commands.serve import APPLICATION, check_storage, read_plan

ENGINES = {"fake": "fakes:build_fake_engine", "tiny": "echo_ray.engine.build:build_engine"}


def deploy(wish: dict[str, Any]) -> None:
    """The application of a Serve config file, one replica and one router a node."""
    import ray
    from ray import serve

    from echo_ray.serve.app import application

    settings = [f"{key}={value}" for key, value in wish["settings"].items()]
    plan = read_plan(Path(wish["config"]), settings)
    check_storage(plan)
    options = {name: dict(chosen) for name, chosen in plan.options.items()}
    options["GeneratorReplica"].pop("autoscaling_config")
    options["GeneratorReplica"]["num_replicas"] = wish["nodes"]
    options["Router"] |= {"num_replicas": wish["nodes"], "max_replicas_per_node": 1}
    ray.init(address=wish["address"], _node_ip_address=wish["node_ip"], log_to_driver=False)
    serve.start(proxy_location="Disabled")
    app = application(plan.args, engine=ENGINES[wish["engine"]], options=options)
    serve.run(app, name=APPLICATION, route_prefix=None)


if __name__ == "__main__":
    deploy(json.loads(sys.argv[1]))
