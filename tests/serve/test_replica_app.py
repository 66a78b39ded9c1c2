from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from echo_ray.config import EchoConfig, ModelSection, from_mapping
from echo_ray.errors import ConfigError, ModelUnknown
from echo_ray.serve.app import application, build
from echo_ray.serve.replica import engine_factory

DEPLOYMENTS = sorted((Path(__file__).parents[2] / "deployments").glob("*.yaml"))


@pytest.mark.parametrize("file", DEPLOYMENTS, ids=lambda f: f.stem)
def test_every_config_file_is_a_serve_config_and_builds(file):
    schema = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))
    assert schema.proxy_location.value == "Disabled"
    (app,) = schema.applications
    assert app.import_path == "echo_ray.serve.app:build"
    from_mapping(EchoConfig, app.args)
    assert build(app.args) is not None
    assert {d.name for d in app.deployments} == {"GeneratorReplica", "Router"}
    replica = next(d for d in app.deployments if d.name == "GeneratorReplica")
    assert (replica.health_check_period_s, replica.health_check_timeout_s) == (1, 3)


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ({"modle": {}}, ConfigError, "did you mean model"),
        ({"storage": {"backend": "memory"}}, ConfigError, "one process only"),
        ({"model": {"preset": "nothing"}}, ModelUnknown, "nothing"),
        ({"session": {"lead_chunks": 0}}, ConfigError, "lead_chunks"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_before_anything_starts(args, error, match):
    with pytest.raises(error, match=match):
        build(args)


def test_the_storage_folder_is_the_same_for_processes_with_other_working_directories(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    bound = application({"storage": {"path": "state"}}, engine="fakes:build_fake_engine")
    config = bound._bound_deployment.init_args[0]
    assert config["storage"]["path"] == str(tmp_path / "state")


def test_an_engine_is_found_by_its_import_path():
    made = engine_factory("fakes:build_fake_engine")(ModelSection())
    assert made.shape.point_every == 4


@pytest.mark.parametrize("path", ["fakes", "fakes:nothing", "no.such.module:x", ":x", ""])
def test_an_engine_that_cannot_be_imported_is_refused(path):
    with pytest.raises(ConfigError, match="module:function"):
        engine_factory(path)
