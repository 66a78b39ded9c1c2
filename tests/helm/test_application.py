"""What the chart hands to Serve is what the service's own configuration accepts."""

from __future__ import annotations

from pathlib import Path

import helm_python
import pytest
import yaml
from charts import CHART, CI, ROOT, application, changed, objects, one, pods, render, values
from ray.serve.schema import ServeDeploySchema

import echo_ray
from echo_ray.config import EchoConfig, from_mapping
from echo_ray.errors import ConfigError
from echo_ray.serve.app import build
from echo_ray.serve.scaling import rules_of


def config(given: dict) -> EchoConfig:
    return from_mapping(EchoConfig, application(objects(given))["args"])


@pytest.mark.parametrize("name", CI)
def test_the_service_takes_the_configuration(name: str) -> None:
    docs = objects(values(name))
    text = one(docs, "RayService")["spec"]["serveConfigV2"]
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    assert schema.proxy_location.value == "Disabled"
    (app,) = schema.applications
    made = from_mapping(EchoConfig, app.args)
    assert (made.http.port, made.http.replica_port, made.http.host) == (8000, 8001, "0.0.0.0")
    assert build(app.args) is not None
    assert {d.name for d in app.deployments} == {"GeneratorReplica", "Router"}


def test_the_file_of_the_deployments_is_read_and_not_copied() -> None:
    link = CHART / "files" / "serve.yaml"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "deployments" / "cluster.yaml"
    for name in ("prometheus", "grafana"):
        assert (CHART / "files" / name).is_symlink()
        assert (CHART / "files" / name).resolve() == ROOT / "infra" / name
    # A setting of that file that the chart has no opinion about.
    (given,) = yaml.safe_load(link.read_text())["applications"]
    kept = given["args"]["session"]["retention_chunks"]
    assert config(values("minimal")).session.retention_chunks == kept


def test_example_addresses_of_that_file_never_reach_a_service() -> None:
    made = config(values("pvc"))
    assert made.storage.redis.url == "redis://redis.example:6379/0"
    assert (made.storage.redis.username, made.storage.redis.password_env) == (None, None)
    assert made.storage.s3.bucket == "echo-video"
    assert "s3" not in application(objects(values("cpu-dev")))["args"]["storage"]
    for name in CI:
        assert "redis.internal" not in yaml.dump(application(objects(values(name))))


def test_settings_of_the_user_come_last() -> None:
    made = config(values("full"))
    assert (made.session.resume_policy, made.limits.sessions) == ("compatible", 500)
    assert made.storage.redis.ca_file == "/etc/ca/ca.pem"
    assert made.storage.redis.url == "rediss://redis.example:6379/0"


def test_an_unknown_setting_is_found_by_the_service() -> None:
    with pytest.raises(ConfigError, match="did you mean lead_chunks"):
        config(changed("minimal", "config/session", {"lead_chunk": 4}))


def test_access_is_on_and_its_secrets_are_files_of_a_secret() -> None:
    made = config(values("minimal")).access
    folder = "/etc/echo-ray/access/"
    assert made.enabled
    assert made.tokens_file == f"{folder}tokens"
    assert made.viewer_secret_file == f"{folder}viewer-secret"
    assert made.replica_secret_file == f"{folder}replica-secret"
    issued = config(values("full")).access
    assert (issued.tokens_file, issued.jwt.audience) == (None, "echo")
    assert not config(values("cpu-dev")).access.enabled


def test_replicas_are_those_of_the_groups() -> None:
    sized = {d["name"]: d for d in application(objects(values("minimal")))["deployments"]}
    assert sized["GeneratorReplica"]["num_replicas"] == 2
    assert sized["Router"]["num_replicas"] == 2
    docs = objects(values("full"))
    sized = {d["name"]: d for d in application(docs)["deployments"]}
    generator = sized["GeneratorReplica"]
    assert "num_replicas" not in generator
    bounds = generator["autoscaling_config"]
    assert (bounds["min_replicas"], bounds["max_replicas"]) == (1, 12)
    assert bounds["policy"]["policy_function"] == "echo_ray.serve.scaling:SessionScaling"
    rules = rules_of(bounds["policy"]["policy_kwargs"])
    assert (rules.spare_slots, rules.at_once, rules.stable_s) == (4, 2, 600)
    cluster = one(docs, "RayService")["spec"]["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"


@pytest.mark.parametrize("name", CI)
def test_one_router_or_one_replica_a_pod(name: str) -> None:
    docs = objects(values(name))
    groups = one(docs, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    offered = {g["groupName"]: g["resources"] for g in groups}
    assert all(r in ({"router": "1"}, {"generator": "1"}) for r in offered.values())
    for deployment in application(docs)["deployments"]:
        role = {"GeneratorReplica": "generator", "Router": "router"}[deployment["name"]]
        assert deployment["ray_actor_options"]["resources"] == {role: 1}
    device = application(docs)["args"]["model"]["device"]
    for group, pod in pods(docs).items():
        limits = pod["spec"]["containers"][0]["resources"]["limits"]
        wanted = 1 if offered.get(group) == {"generator": "1"} and device == "cuda" else 0
        assert limits.get("nvidia.com/gpu", 0) == wanted


def test_versions_are_those_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == echo_ray.__version__
    ray = yaml.safe_load((CHART / "values.yaml").read_text())["rayVersion"]
    assert f'"ray[serve]=={ray}"' in (ROOT / "pyproject.toml").read_text()


def test_a_chart_from_an_archive_renders_the_same(tmp_path: Path) -> None:
    archive = helm_python.package(CHART, destination=tmp_path)
    packed = helm_python.Chart.load_archive(Path(archive).read_bytes())
    found = packed.render(values("full"), name="demo", namespace="video")
    again = {Path(k).name: v.strip() for k, v in found.items() if v.strip()}
    assert again == render(values("full"))
    names = {f["name"] for f in packed.files}
    assert not any(n.startswith("ci/") or "provisioning" in n for n in names)
