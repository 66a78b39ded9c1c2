"""What the chart refuses, and that it says which value to change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from charts import CHART, changed, render, values
from helm_python import HelmRenderError, HelmValuesError

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
GPU = {"limits": {"memory": "1Gi", "nvidia.com/gpu": 1}}

BY_SCHEMA = [
    ("images", {}, "images"),
    ("image/tagg", "1", "tagg"),
    ("image/tag", "a b", "/image/tag"),
    ("image/repository", "echo:latest", "/image/repository"),
    ("image/digest", "sha256:12", "/image/digest"),
    ("fullnameOverride", "Video", "/fullnameOverride"),
    ("fullnameOverride", "v" * 48, "/fullnameOverride"),
    ("rayVersion", 2.6, "/rayVersion"),
    ("model/device", "tpu", "/model/device"),
    ("weights/source", "hostPath", "/weights/source"),
    ("weights/uri", "https://models", "/weights/uri"),
    ("weights/size", "40", "/weights/size"),
    ("storage/backend", "local", "/storage/backend"),
    ("storage/redis/url", "rediss://me:secret@redis:6379/0", "/storage/redis/url"),
    ("storage/redis/password", "secret", "password"),
    ("storage/s3/endpoint", "s3.example", "/storage/s3/endpoint"),
    ("storage/s3/secretKey", "secret", "secretKey"),
    ("access/tokens", {}, "tokens"),
    ("gcsFaultTolerance/redis/address", "redis.example", "/gcsFaultTolerance/redis/address"),
    ("workerGroups/Big", {"role": "router"}, "Big"),
    ("workerGroups/gpu/role", "worker", "/workerGroups/gpu"),
    ("workerGroups/gpu/replicas", "2", "/workerGroups/gpu"),
    ("workerGroups/gpu/minAvailable", "50%", "/workerGroups/gpu"),
    ("workerGroups/gpu/toleration", [], "/workerGroups/gpu"),
    ("head/replicas", 2, "replicas"),
    ("pods/securityContext/runAsNonRoot", False, "runAsNonRoot"),
    ("pods/securityContext/runAsUser", 0, "runAsUser"),
    ("pods/shm", "1T", "/pods/shm"),
    ("autoscaling/upscalingMode", "Fast", "/autoscaling/upscalingMode"),
    ("drain/sessionSeconds", 0, "/drain/sessionSeconds"),
    ("upgrade/strategy", "NewClusterWithIncrementalUpgrade", "/upgrade/strategy"),
    ("service/type", "ExternalName", "/service/type"),
    ("ingress/hosts", ["a"], "hosts"),
    ("ingress/paths", ["v1"], "/ingress/paths/0"),
    ("ingress/paths", ["/"], "/ingress/paths/0"),
    ("networkPolicy/clients", {}, "/networkPolicy/clients"),
    ("podMonitor/interval", 15, "/podMonitor/interval"),
    ("prometheusRule/runbookBase", "docs", "/prometheusRule/runbookBase"),
    ("dashboards/labels", {"a": 1}, "/dashboards/labels"),
    ("valkey/image", "valkey", "/valkey/image"),
]

BY_RULE = [
    ("image/repository", "", "image.repository is empty: build infra/docker/Dockerfile"),
    ("access/existingSecret", "", "access.existingSecret is empty: name a secret"),
    ("storage/redis/url", "", "storage.redis.url is empty: name the Redis"),
    ("storage/s3/bucket", "", "storage.s3.bucket is empty: storage.backend"),
    ("valkey/enabled", True, "valkey.enabled stands in for storage.redis: clear"),
    ("gcsFaultTolerance/redis/address", "", "name a Redis of Ray's own, or set"),
    ("gcsFaultTolerance/redis/address", "redis.example:6379", "give Ray one of its own"),
    ("weights/source", "pvc", "set weights.existingClaim"),
    ("weights/source", "objectStore", "set weights.uri to s3://BUCKET/PREFIX"),
    ("weights/source", "preset", "set weights.source to image, pvc or objectStore"),
    ("weights/existingClaim", "c", "weights.existingClaim is set but weights.source is image"),
    ("weights/uri", "s3://b/p", "weights.uri is set but weights.source is image"),
    ("workerGroups/other", {"role": "router", "replicas": 1}, "workerGroups.other needs a role"),
    ("workerGroups/gpu/minAvailable", 2, "would hold up every node drain: at most 1"),
    ("workerGroups/gpu/shm", "64Mi", "workerGroups.gpu.shm 64Mi is too small"),
    ("head/shm", "255Mi", "head.shm 255Mi is too small"),
    ("workerGroups/gpu/replicas", 0, "no worker group has a generator"),
    ("workerGroups/router/enabled", False, "no worker group has a router"),
    ("workerGroups/gpu/resources/limits/nvidia.com~gpu", 2, "has 2 GPUs, a generator"),
    ("workerGroups/router/resources/limits/nvidia.com~gpu", 1, "has 1 GPUs, a router"),
    ("model/device", "cpu", "a generator with model.device cpu needs 0"),
    ("autoscaling/enabled", True, "give a generator group a maxReplicas above"),
    ("drain/replicaSeconds", 27, "drain.replicaSeconds 27 is too short: at least"),
    ("drain/nodeSeconds", 60, "drain.nodeSeconds 60 must be more than"),
    ("drain/podSeconds", 110, "drain.podSeconds 110 must be more than"),
    ("upgrade/clusterDeletionDelaySeconds", 60, "must not be less than drain.podSeconds"),
    ("ingress/tlsSecret", "tls", None),
    ("networkPolicy/operatorNamespace", "", "name the namespace of the KubeRay operator"),
    ("config/session", {"drain_s": 5}, "config.session.drain_s is decided by drain.session"),
    ("config/model", {"device": "cpu"}, "config.model.device is decided by model.device"),
    ("config/http", {"port": 80}, "config.http.port is decided by the Service"),
    ("config/http", {"replica_port": 0}, "config.http.replica_port is decided by the PodMon"),
    ("config/storage", {"redis": {"url": "redis://a:1"}}, "is decided by storage.redis.url"),
    ("config/access", {"enabled": False}, "config.access.enabled is decided by access.enabled"),
    ("serve/generator", {"num_replicas": 3}, "is decided by replicas of the generator groups"),
    ("serve/router", {"num_replicas": 3}, "is decided by replicas of the router groups"),
    ("autoscaling/generator", {"max_replicas": 9}, "is decided by maxReplicas"),
]


def given(path: str, value: object) -> dict[str, Any]:
    found = changed("minimal", path, value) if "~" not in path else values("minimal")
    if "~" in path:
        *parents, last = path.split("/")
        node = found
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last.replace("~", "/")] = value
    return found


@pytest.mark.parametrize(("path", "value", "names"), BY_SCHEMA)
def test_the_schema_refuses(path: str, value: object, names: str) -> None:
    with pytest.raises(HelmValuesError) as told:
        render(given(path, value))
    said = str(told.value)
    assert names in said or names.strip("/").replace("/", ".") in said


@pytest.mark.parametrize(("path", "value", "says"), BY_RULE)
def test_a_combination_is_refused_with_its_remedy(path: str, value: object, says: str) -> None:
    wrong = given(path, value)
    if says is None:
        render(wrong)
        wrong["ingress"]["enabled"] = True
        says = "set ingress.host"
    with pytest.raises(HelmRenderError) as told:
        render(wrong)
    assert says in str(told.value)


def test_bounds_count_with_autoscaling_only() -> None:
    wrong = changed("full", "workerGroups/gpu/minReplicas", 9)
    with pytest.raises(HelmRenderError, match="minReplicas 9 is more than maxReplicas 8"):
        render(wrong)
    wrong = changed("full", "workerGroups/gpu/replicas", 9)
    with pytest.raises(HelmRenderError, match="must lie between minReplicas 1 and maxReplicas 8"):
        render(wrong)
    wrong["autoscaling"]["enabled"] = False
    assert "replicas: 9" in render(wrong)["rayservice.yaml"]


def test_autoscaling_needs_room() -> None:
    wrong = changed("full", "workerGroups/spot/enabled", False)
    wrong["workerGroups"]["gpu"] |= {"minReplicas": 2, "maxReplicas": 2}
    with pytest.raises(HelmRenderError, match="give a generator group a maxReplicas above"):
        render(wrong)


def test_a_release_that_begins_with_a_digit_is_told_to_take_a_name() -> None:
    with pytest.raises(HelmRenderError, match="set fullnameOverride"):
        render(values("minimal"), name="1st")


def leaves(schema: dict[str, Any], at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield at, schema
    for name, inner in schema.get("properties", {}).items():
        yield from leaves(inner, f"{at}/{name}")


def test_the_schema_is_closed_wherever_the_chart_reads() -> None:
    opened = {
        at
        for at, schema in leaves(SCHEMA)
        if schema.get("type") == "object" and "additionalProperties" not in schema
    }
    assert opened == {
        "/global", "/config", "/serve/generator", "/serve/router", "/autoscaling/generator",
        "/head/affinity", "/pods/securityContext",
    }  # fmt: skip


def test_values_and_schema_have_the_same_keys() -> None:
    def keys(node: object, schema: dict[str, Any], at: str = "") -> Iterator[tuple[str, set[str]]]:
        if isinstance(node, dict) and "properties" in schema and at != "/head":
            yield at, set(node) ^ set(schema["properties"])
            for name in set(node) & set(schema["properties"]):
                yield from keys(node[name], schema["properties"][name], f"{at}/{name}")

    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    assert {at: odd for at, odd in keys(defaults, SCHEMA) if odd} == {"": {"global"}}
