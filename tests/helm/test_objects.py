"""Properties of what is rendered, flag by flag."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from charts import (
    CHART,
    CI,
    ROOT,
    application,
    changed,
    manifests,
    objects,
    one,
    pods,
    render,
    values,
)


def container(pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod["spec"]["containers"]
    return dict(found)


def variables(pod: dict[str, Any]) -> dict[str, Any]:
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container(pod)["env"]}


def mounts(box: dict[str, Any]) -> dict[str, str]:
    return {m["name"]: m["mountPath"] for m in box["volumeMounts"]}


@pytest.mark.parametrize("name", CI)
def test_no_pod_runs_as_root_or_writes_to_its_image(name: str) -> None:
    docs = objects(values(name))
    templates = [*pods(docs).values()]
    templates += [d["spec"]["template"] for d in docs if d["kind"] == "Deployment"]
    for pod in templates:
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for box in [*spec["containers"], *spec.get("initContainers", [])]:
            rights = box["securityContext"]
            assert rights["readOnlyRootFilesystem"] is True
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert "limits" in box["resources"]
    for pod in pods(docs).values():
        sizes = {v["name"]: v.get("emptyDir") for v in pod["spec"]["volumes"]}
        assert sizes["shm"]["medium"] == "Memory"
        assert sizes["tmp"]["sizeLimit"] == "10Gi"
        assert mounts(container(pod))["tmp"] == "/tmp"
        assert mounts(container(pod))["shm"] == "/dev/shm"


@pytest.mark.parametrize("name", CI)
def test_workers_have_no_rights_in_the_cluster_and_the_head_no_secrets(name: str) -> None:
    docs = objects(values(name))
    for group, pod in pods(docs).items():
        if group == "head":
            assert "serviceAccountName" not in pod["spec"]
            assert not any("valueFrom" in e for e in container(pod)["env"])
            assert {v["name"] for v in pod["spec"]["volumes"]} == {"tmp", "shm"}
        else:
            assert pod["spec"]["automountServiceAccountToken"] is False
    text = manifests(values(name))
    assert "kind: Secret" not in text


@pytest.mark.parametrize("name", CI)
def test_a_pod_ends_after_its_node_and_that_after_its_replica(name: str) -> None:
    docs = objects(values(name))
    app = application(docs)
    sized = {d["name"]: d for d in app["deployments"]}
    replica_s = sized["GeneratorReplica"]["graceful_shutdown_timeout_s"]
    for group, pod in pods(docs).items():
        if group == "head":
            continue
        node_s = int(variables(pod)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        pod_s = pod["spec"]["terminationGracePeriodSeconds"]
        session_s = app["args"]["session"]["drain_s"]
        assert session_s + 8 <= replica_s < node_s < pod_s - session_s
        assert one(docs, "RayService")["spec"]["rayClusterDeletionDelaySeconds"] >= pod_s
        hook = container(pod)["lifecycle"]["preStop"]["exec"]["command"]
        if pod["metadata"]["labels"]["echo-ray/role"] == "generator":
            secret = app["args"]["access"].get("replica_secret_file")
            shown = f" --secret-file {secret}" if secret else ""
            drain = f'exec echo-ray drain "$POD_IP" --port 8001 --within {session_s}'
            assert hook[-1] == drain + shown
            assert session_s < pod_s
        else:
            assert hook == ["sleep", "5"]


@pytest.mark.parametrize("name", CI)
def test_probes_and_the_monitor_ask_ports_that_are_there(name: str) -> None:
    docs = objects(values(name))
    offered = set()
    for pod in pods(docs).values():
        box = container(pod)
        ports = {p["name"]: p["containerPort"] for p in box["ports"]}
        offered |= set(ports)
        ready = box["readinessProbe"]["httpGet"]
        role = pod["metadata"]["labels"]["echo-ray/role"]
        # A probe of our own keeps KubeRay from asking workers for a proxy that is not there.
        asked = {"head": 52365, "router": "http", "generator": "replica"}[role]
        assert ready["port"] == asked
        assert asked == 52365 or asked in ports
    http = application(docs)["args"]["http"]
    every = {
        p["name"]: p["containerPort"] for t in pods(docs).values() for p in container(t)["ports"]
    }
    assert (every["http"], every["replica"]) == (http["port"], http["replica_port"])
    if any(d["kind"] == "PodMonitor" for d in docs):
        scraped = {e["port"] for e in one(docs, "PodMonitor")["spec"]["podMetricsEndpoints"]}
        assert scraped == offered - {"gcs-server", "dashboard", "serve"}


def test_services_and_budgets_select_the_pods_that_they_mean() -> None:
    docs = objects(values("minimal"))
    labels = {g: p["metadata"]["labels"] for g, p in pods(docs).items()}
    service = one(docs, "Service")["spec"]
    chosen = [g for g, found in labels.items() if service["selector"].items() <= found.items()]
    assert chosen == ["router"]
    assert service["ports"] == [{"name": "http", "port": 8000, "targetPort": "http"}]
    budgets = {d["metadata"]["name"]: d["spec"] for d in docs if d["kind"] == "PodDisruptionBudget"}
    assert set(budgets) == {"demo-echo-ray-gpu", "demo-echo-ray-router"}
    assert all(b["minAvailable"] == 1 for b in budgets.values())
    given = changed("minimal", "workerGroups/gpu/minAvailable", 0)
    assert "demo-echo-ray-gpu" not in render(given)["pdb.yaml"]
    given["podDisruptionBudget"] = {"enabled": False}
    assert "pdb.yaml" not in render(given)


def test_weights_come_from_where_they_are_said_to() -> None:
    path = "/models/weights"
    image = pods(objects(values("minimal")))["gpu"]
    assert "weights" not in mounts(container(image))
    claim = pods(objects(values("pvc")))["gpu"]
    assert mounts(container(claim))["weights"] == path
    (volume,) = (v for v in claim["spec"]["volumes"] if v["name"] == "weights")
    assert volume["persistentVolumeClaim"] == {"claimName": "echo-weights", "readOnly": True}
    store = pods(objects(values("full")))
    (fetch,) = store["gpu"]["spec"]["initContainers"]
    assert fetch["args"][-2:] == ["s3://models/echo-infinity-1.3b", path]
    assert "--endpoint-url=https://s3.example" in fetch["args"]
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= {e["name"] for e in fetch["env"]}
    assert "initContainers" not in store["router"]["spec"]
    for name, wanted in (("minimal", path), ("full", path), ("cpu-dev", None)):
        assert application(objects(values(name)))["args"]["model"].get("weights") == wanted


def test_secrets_are_named_and_never_written() -> None:
    found = pods(objects(values("full")))
    seen = variables(found["gpu"])
    assert seen["ECHO_REDIS_PASSWORD"]["secretKeyRef"] == {"name": "echo-redis", "key": "password"}
    assert seen["AWS_SECRET_ACCESS_KEY"]["secretKeyRef"]["name"] == "echo-s3"
    (secret,) = (v for v in found["gpu"]["spec"]["volumes"] if v["name"] == "access")
    # A generator has no business with the tokens of users.
    assert [i["key"] for i in secret["secret"]["items"]] == ["replica-secret"]
    (secret,) = (v for v in found["router"]["spec"]["volumes"] if v["name"] == "access")
    assert secret["secret"] == {"secretName": "echo-access"}
    identity = objects(values("minimal"))
    assert "AWS_ACCESS_KEY_ID" not in variables(pods(identity)["gpu"])
    assert one(identity, "ServiceAccount")["metadata"]["annotations"]
    assert pods(identity)["gpu"]["spec"]["serviceAccountName"] == "demo-echo-ray"
    none = pods(objects(values("pvc")))
    assert none["gpu"]["spec"]["serviceAccountName"] == "video"


def test_the_door_is_open_and_nothing_else() -> None:
    docs = objects(values("full"))
    rules = one(docs, "Ingress")["spec"]["rules"][0]["http"]["paths"]
    open_to_all = {(p["path"], p["pathType"]) for p in rules}
    assert ("/", "Exact") in open_to_all
    assert not any(p.startswith(("/v1/admin", "/metrics")) for p, _ in open_to_all)
    assert all(kind == "Prefix" for p, kind in open_to_all if p != "/")
    notes = one(docs, "Ingress")["metadata"]["annotations"]
    assert notes["nginx.ingress.kubernetes.io/proxy-send-timeout"] == "3600"
    assert notes["nginx.ingress.kubernetes.io/proxy-read-timeout"] == "7200"
    inside, head, router = (
        one(docs, "NetworkPolicy", f"video{end}")["spec"] for end in ("", "-head", "-router")
    )
    assert inside["policyTypes"] == ["Ingress", "Egress"]
    assert "ports" not in inside["ingress"][0]
    assert inside["ingress"][0]["from"] == [{"podSelector": inside["podSelector"]}]
    assert head["ingress"][0]["ports"] == [{"port": 8265}]
    assert router["ingress"][0]["ports"] == [{"port": 8000}]
    assert router["ingress"][0]["from"] == values("full")["networkPolicy"]["clients"]
    plain = objects(values("minimal"))
    assert one(plain, "NetworkPolicy", "demo-echo-ray")["spec"]["policyTypes"] == ["Ingress"]
    assert "from" not in one(plain, "NetworkPolicy", "demo-echo-ray-router")["spec"]["ingress"][0]
    assert not any(d["kind"] == "NetworkPolicy" for d in objects(values("pvc")))


def test_a_group_may_have_an_image_a_shm_and_variables_of_its_own() -> None:
    found = pods(objects(values("full")))
    images = {group: container(pod)["image"] for group, pod in found.items()}
    assert images["router"] == "registry.example/echo-ray:1.2.3-cpu"
    assert images["gpu"] == images["head"] == "registry.example/echo-ray:1.2.3-gpu"
    assert found["gpu"]["spec"]["runtimeClassName"] == "nvidia"
    assert variables(found["spot"])["TRITON_CACHE_DIR"] == "/tmp/triton"
    assert "TRITON_CACHE_DIR" not in variables(found["gpu"])
    digest = container(pods(objects(values("pvc")))["gpu"])["image"]
    assert digest.startswith("registry.example/echo-ray@sha256:")
    kinds = {
        n: container(pods(objects(values(n)))["head"])["image"] for n in ("minimal", "cpu-dev")
    }
    assert kinds["minimal"].endswith(":0.1.0-gpu")
    assert kinds["cpu-dev"].endswith(":0.1.0-cpu")


def test_pods_are_spread_with_their_group() -> None:
    for group, pod in pods(objects(values("minimal"))).items():
        spread = pod["spec"].get("topologySpreadConstraints", [])
        assert len(spread) == (0 if group == "head" else 2)
        assert all(c["labelSelector"]["matchLabels"]["ray.io/group"] == group for c in spread)


def test_a_new_version_of_the_chart_builds_no_second_cluster(tmp_path: Path) -> None:
    copied = tmp_path / "helm"
    shutil.copytree(CHART, copied)
    about = copied / "Chart.yaml"
    about.write_text(about.read_text().replace("\nversion: 0.1.0", "\nversion: 9.9.9"))
    for name in CI:
        before, after = objects(values(name)), objects(values(name), folder=copied)
        assert one(before, "RayService")["spec"] == one(after, "RayService")["spec"]
        assert one(before, "RayService")["metadata"] != one(after, "RayService")["metadata"]
        text = yaml.dump([*pods(before).values()])
        assert "checksum" not in text
        assert "helm.sh" not in text


def test_labels_of_objects_reach_no_pod() -> None:
    docs = objects(values("full"))
    assert all(d["metadata"]["labels"]["team"] == "live" for d in docs)
    assert all("team" not in p["metadata"]["labels"] for p in pods(docs).values())


def test_rules_and_dashboards_are_those_of_infra() -> None:
    docs = objects(values("full"))
    groups = []
    for file in sorted((ROOT / "infra" / "prometheus").glob("*.yaml")):
        groups += yaml.safe_load(file.read_text()).get("groups", [])
    assert one(docs, "PrometheusRule")["spec"]["groups"] == groups
    made = {k: v for d in docs if d["kind"] == "ConfigMap" for k, v in d["data"].items()}
    files = {f.name: f for f in (ROOT / "infra" / "grafana" / "dashboards").glob("*.json")}
    assert set(made) == set(files)
    for name, file in files.items():
        assert json.loads(made[name]) == json.loads(file.read_text())
        assert len(made[name]) < 2**20


def test_runbooks_have_an_address() -> None:
    given = values("full")
    given["prometheusRule"]["runbookBase"] = "https://example.org/echo/"
    rules = [r for g in one(objects(given), "PrometheusRule")["spec"]["groups"] for r in g["rules"]]
    links = [r["annotations"]["runbook_url"] for r in rules if "alert" in r]
    assert links
    for link in links:
        assert link.startswith("https://example.org/echo/docs/operations.md#")


def test_what_is_off_is_absent() -> None:
    kinds = {d["kind"] for d in objects(values("cpu-dev"))}
    assert kinds == {"RayService", "Service", "ServiceAccount", "Deployment"}
    cluster = one(objects(values("cpu-dev")), "RayService")["spec"]["rayClusterConfig"]
    assert "gcsFaultToleranceOptions" not in cluster
    assert "enableInTreeAutoscaling" not in cluster
