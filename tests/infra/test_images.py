"""The Dockerfile, the compose file and the wheel: what can be checked without containers."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

import echo_ray
from echo_ray.config import EchoConfig, from_mapping

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "infra" / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
TOOLS = re.compile(r"apt-get|apk |gcc|g\+\+|build-essential|\bpip\b|\bgit\b|curl|sudo")

COMPILER = (
    "RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev "
    "&& rm -rf /var/lib/apt/lists/*"
)
BUILT_WITH: dict[str, list[str]] = {"cpu": [], "gpu": [COMPILER]}
"""Tools in an image that serves: Triton builds its launchers where it runs."""


def stages(text: str) -> dict[str, tuple[str, list[str]]]:
    """Each stage: what it stands on, and its instructions with their continuation lines."""
    found: dict[str, tuple[str, list[str]]] = {}
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            found[match[2]] = (match[1], [])
        elif found and line and not line.startswith("#"):
            found[list(found)[-1]][1].append(line)
    return found


STAGES = stages(DOCKERFILE)


def lint(text: str, tmp_path: Path) -> str:
    file = tmp_path / "Dockerfile"
    file.write_text(text)
    tool = Path(sys.executable).parent / "hadolint"
    call = [str(tool), "--no-color", str(file)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def test_the_dockerfile_lints(tmp_path: Path) -> None:
    assert lint(DOCKERFILE, tmp_path) == ""
    spoilt = DOCKERFILE.replace("FROM python:${PYTHON} AS base", "FROM python:latest AS base")
    assert "DL3007" in lint(spoilt, tmp_path)


def test_bases_are_one_exact_python() -> None:
    (pinned,) = re.findall(r"^ARG PYTHON=(.+)$", DOCKERFILE, re.M)
    assert re.fullmatch(r"3\.11\.\d+-slim-\w+", pinned)
    outside = {base for base, _ in STAGES.values() if base not in STAGES}
    assert outside == {"python:${PYTHON}"}


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_target_is_small_and_not_root(target: str) -> None:
    base, lines = STAGES[target]
    assert base == "base"
    assert STAGES["base"][0] == "python:${PYTHON}"
    inherited = STAGES["base"][1]
    assert lines[-1] == "USER 1000:1000"
    found = [line for line in [*inherited, *lines] if TOOLS.search(line)]
    assert [" ".join(line.split()) for line in found] == BUILT_WITH[target]
    assert [line for line in lines if line.startswith("COPY")] == [
        f"COPY --from=packages-{target} /opt/echo-ray /opt/echo-ray"
    ]
    assert any(line.startswith("HEALTHCHECK") and "/healthz" in line for line in inherited)
    assert not any(line.startswith(("ADD", "ARG")) for line in [*inherited, *lines])


@pytest.mark.parametrize(("target", "extras"), [("cpu", "server,cluster"), ("gpu", "gpu")])
def test_packages_are_pinned_and_come_with_the_wheel(target: str, extras: str) -> None:
    (install,) = (line for line in STAGES[f"packages-{target}"][1] if line.startswith("RUN"))
    assert "--constraint /wheels/constraints.txt" in install
    assert extras in re.findall(r"\[(.*?)\]", install)[0]
    assert "pip wheel" in STAGES["wheel"][1][-1]


def test_what_the_wheel_is_made_of_is_let_into_the_build() -> None:
    let_in = (DOCKER / "Dockerfile.dockerignore").read_text().split()
    assert let_in[0] == "*"
    copied = set(re.findall(r"^COPY (?!--)(.+) \S+$", DOCKERFILE, re.M))
    for name in (word for line in copied for word in line.split()):
        assert f"!{name}" in let_in
        assert (ROOT / name).exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the wheel, built as the image does from what it is given."""
    source = tmp_path_factory.mktemp("source")
    for name in re.findall(r"^!(\S+)$", (DOCKER / "Dockerfile.dockerignore").read_text(), re.M):
        (source / name).symlink_to(ROOT / name)
    call = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    call += ["--no-index", "--wheel-dir", str(source / "wheels"), str(source)]
    subprocess.run(call, check=True, timeout=50, capture_output=True)
    (built,) = (source / "wheels").glob(f"echo_ray-{echo_ray.__version__}-*.whl")
    return set(zipfile.ZipFile(built).namelist())


def test_the_wheel_holds_all_that_is_no_code(wheel: set[str]) -> None:
    kinds = ("presets/*/*", "player/*", "training/configs/**/*.toml", "commands/*.yaml", "py.typed")
    wanted = {
        str(file.relative_to(ROOT))
        for kind in kinds
        for file in (ROOT / "echo_ray").glob(kind)
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert len(wanted) > 20
    assert wanted - wheel == set()
    assert {name.split("/")[0] for name in wheel if ".dist-info" not in name} == {
        "echo_ray",
        "echo_kernels",
    }


def test_compose_has_every_part_pinned() -> None:
    assert set(SERVICES) == {"echo-ray", "redis", "s3", "bucket", "prometheus", "grafana"}
    for service in SERVICES.values():
        tag = service["image"].rpartition(":")[2]
        assert re.search(r"\d", tag)
        assert "latest" not in tag
    assert SERVICES["echo-ray"]["image"] == f"echo-ray:{echo_ray.__version__}-cpu"


def test_compose_lets_only_this_machine_in_and_writes_no_secret() -> None:
    for service in SERVICES.values():
        assert all(p.startswith("127.0.0.1:") for p in service.get("ports", []))
        for name, value in service.get("environment", {}).items():
            if "PASSWORD" in name or "SECRET" in name:
                assert re.fullmatch(r"\$\{\w+:\?.+\}", value), name
        assert "privileged" not in service


def test_compose_mounts_what_is_there() -> None:
    for service in SERVICES.values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).resolve().exists(), source
                assert mount.endswith(":ro")
            else:
                assert source in COMPOSE["volumes"]
    build = SERVICES["echo-ray"]["build"]
    assert (DOCKER / build["context"]).resolve() == ROOT
    assert build["target"] in STAGES


def test_compose_serves_a_configuration_that_finds_its_stores() -> None:
    text = (ROOT / "deployments" / "compose.yaml").read_text()
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    config = from_mapping(EchoConfig, schema.applications[0].args)
    assert config.storage.redis.url == "redis://redis:6379/0"
    assert config.storage.s3.endpoint == "http://s3:9000"
    assert f"s3/{config.storage.s3.bucket}" in str(SERVICES["bucket"]["command"])
    assert config.storage.redis.durability == "always"
    given = SERVICES["redis"]["command"]
    assert given[given.index("--appendfsync") + 1] == "always"
    assert given[given.index("--maxmemory-policy") + 1] == "noeviction"
    (drained,) = (
        d.graceful_shutdown_timeout_s
        for d in schema.applications[0].deployments
        if d.name == "GeneratorReplica"
    )
    assert float(SERVICES["echo-ray"]["stop_grace_period"].removesuffix("s")) > drained


def test_prometheus_asks_the_service_where_its_replicas_are() -> None:
    config = yaml.safe_load((ROOT / "infra" / "prometheus" / "prometheus.yml").read_text())
    found = [sd["url"] for job in config["scrape_configs"] for sd in job.get("http_sd_configs", [])]
    assert found == ["http://127.0.0.1:8000/metrics/targets"]
    assert all((ROOT / "infra" / "prometheus" / f).is_file() for f in config["rule_files"])
    assert SERVICES["prometheus"]["network_mode"] == "service:echo-ray"
