"""Rendered objects against the schemas of Kubernetes, and of KubeRay where they are at hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml
from charts import CHART, CI, ROOT, manifests, objects, one, pods, values

TOOL = ROOT.parent / "shared" / "tools" / "validate_manifests.py"
CRDS = ROOT.parent / "shared" / "k8s"
OLDEST, NEWEST = "1.28", "1.37"
CUSTOM = {"RayService": "ray.io/v1", "PodMonitor": "monitoring.coreos.com/v1"}
CUSTOM["PrometheusRule"] = CUSTOM["PodMonitor"]


@pytest.mark.parametrize("name", CI)
def test_the_chart_lints(name: str) -> None:
    said = helm_python.lint(CHART, values(name), strict=True, quiet=True)
    problems = [
        m for m in said.get("messages", []) if m.get("severity") not in (None, 0, 1, "INFO")
    ]
    assert problems == []
    assert not said.get("errors")


@pytest.mark.parametrize("name", CI)
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_core_objects_and_pods_are_valid(name: str, version: str) -> None:
    docs = objects(values(name))
    for doc in docs:
        if doc["kind"] in CUSTOM:
            assert doc["apiVersion"] == CUSTOM[doc["kind"]]
        else:
            kubernetes_validate.validate(doc, version, strict=True)
    for group, template in pods(docs).items():
        meta = {"name": group, "labels": template["metadata"]["labels"]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": template["spec"]}
        kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("name", CI)
def test_every_mount_has_its_volume_and_every_name_is_once(name: str) -> None:
    docs = objects(values(name))
    names = [(d["kind"], d["metadata"]["name"]) for d in docs]
    assert len(names) == len(set(names))
    for pod in pods(docs).values():
        there = [v["name"] for v in pod["spec"]["volumes"]]
        assert len(there) == len(set(there))
        for box in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
            assert {m["name"] for m in box["volumeMounts"]} <= set(there)
            set_twice = [e["name"] for e in box["env"]]
            assert len(set_twice) == len(set(set_twice))


@pytest.mark.parametrize("name", CI)
def test_what_kuberay_asks_at_run_time(name: str) -> None:
    service = one(objects(values(name)), "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    assert len(service["metadata"]["name"]) <= 47
    assert set(service["spec"]) == {
        "upgradeStrategy", "rayClusterDeletionDelaySeconds", "excludeHeadPodFromServeSvc",
        "serveConfigV2", "rayClusterConfig",
    }  # fmt: skip
    assert isinstance(service["spec"]["serveConfigV2"], str)
    head = cluster["headGroupSpec"]
    params = [head["rayStartParams"], *(g["rayStartParams"] for g in cluster["workerGroupSpecs"])]
    assert all(isinstance(v, str) for p in params for v in p.values())
    ports = head["template"]["spec"]["containers"][0]["ports"]
    assert "serve" in [p["name"] for p in ports]
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert "restartPolicy" not in group["template"]["spec"]
        limits = group["template"]["spec"]["containers"][0]["resources"]
        for resource, count in limits["limits"].items():
            if "/" in resource:
                assert limits["requests"][resource] == count


def checked(text: str, tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "objects.yaml"
    file.write_text(text)
    words = [sys.executable, str(TOOL), "--crd", str(CRDS), "--require-kind", "RayService"]
    call = [*words, "--warnings-as-errors", *more, str(file)]
    return subprocess.run(call, capture_output=True, text=True, timeout=50, check=False)


@pytest.mark.skipif(not TOOL.is_file(), reason="no ../shared beside the repository")
@pytest.mark.parametrize("name", CI)
def test_the_validator_finds_nothing(name: str, tmp_path: Path) -> None:
    done = checked(manifests(values(name)), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not TOOL.is_file(), reason="no ../shared beside the repository")
def test_the_validator_finds_what_is_wrong(tmp_path: Path) -> None:
    docs = objects(values("minimal"))
    one(docs, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpec"] = []
    done = checked(yaml.dump_all(docs), tmp_path)
    assert done.returncode == 1
    assert "workerGroupSpec" in done.stdout


@pytest.mark.parametrize("spoil", ["unknown field", "wrong type"])
def test_our_own_checks_find_what_is_wrong(spoil: str) -> None:
    service: dict[str, Any] = one(objects(values("minimal")), "Service")
    service["spec"] |= {"selctor": {}} if spoil == "unknown field" else {"ports": "8000"}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(service, NEWEST, strict=True)
