import shutil
import socket
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import yaml
from PIL import Image

from echo_ray import __version__
from echo_ray.cli import main
from echo_ray.commands.serve import ServePlan, check_port, default_config, read_plan
from echo_ray.config import EchoConfig, from_mapping, read_yaml
from echo_ray.errors import ConfigError, ModelUnknown
from echo_ray.preset import preset_folder
from echo_ray.serve.app import application
from echo_ray.serve.scaling import rules_of
from echo_ray.session.scaling import Rules
from echo_ray.session.snapshot import Buffer, Snapshot, encode

ROOT = Path(__file__).parents[1]


def refused(capsys, *words):
    """What a refused command says; it must exit with 2 and print nothing else."""
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.strip()


def write_config(path, **changes):
    data = yaml.safe_load(default_config().read_text())
    data["applications"][0].update(changes)
    path.write_text(yaml.safe_dump(data))
    return path


def test_help_names_every_command_and_imports_nothing_heavy():
    script = (
        "import sys; from echo_ray.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'ray', 'torch', 'av', 'numpy', 'fastapi'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("serve", "play", "demo", "parity", "snapshot"):
        assert f"\n  {name} " in done.stdout
    assert "demo_report" not in done.stdout


def test_version_and_no_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"echo-ray {__version__}\n"
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().err


def test_unknown_commands_are_refused(capsys):
    said = refused(capsys, "sreve")
    assert said == "echo-ray: config_invalid: command 'sreve' is unknown (did you mean serve?)"
    assert "known: " in refused(capsys, "demo_report_of_nothing_known")
    assert "unknown" in refused(capsys, "demo_report")


def test_a_missing_package_is_named(capsys, monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'ray'", name="ray")

    monkeypatch.setattr("echo_ray.commands.serve.read_plan", missing)
    assert "needs the package ray" in refused(capsys, "serve")


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("htpt.port=1", "htpt: unknown (did you mean http?)"),
        ("http.prot=1", "http.prot: unknown (did you mean port?)"),
        ("http.port=abc", "http.port: expected int, got 'abc'"),
        ("http.port=70000", "http.port: 70000 is not allowed: 0 to 65535"),
        ("http.replica_port=-1", "http.replica_port: -1 is not allowed: 0 to 65535"),
        ("http.port", "write it as section.key=value"),
        ("http.port=[1", "not a value"),
        ("model.preset=gpt", "model 'gpt' is unknown; known: echo-infinity-1.3b, "),
        (
            "model.preset=echo-infinity-1.3b",
            "model.weights: preset echo-infinity-1.3b comes without",
        ),
        ("model.weights=/nowhere", "/nowhere"),
        ("model.vae=wan", "model.vae: 'wan' is not allowed: preset echo-tiny has group"),
        ("http.host=999.1.1.1", "http.port: 999.1.1.1:8000 is"),
    ],
)
def test_serve_refuses_settings(capsys, assignment, says):
    assert says in refused(capsys, "serve", "--set", assignment)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"import_path": "os:system"}, "import_path: 'os:system' is not served here"),
        ({"args": [1]}, "args: expected a mapping"),
        ({"args": {"modle": {}}}, "modle: unknown (did you mean model?)"),
        ({"deployments": ["Router"]}, "deployments: expected a list of mappings with a name"),
    ],
)
def test_serve_refuses_config_files(capsys, tmp_path, changes, says):
    file = write_config(tmp_path / "local.yaml", **changes)
    assert says in refused(capsys, "serve", "--config", str(file))


def test_serve_refuses_what_is_no_config_file(capsys, tmp_path):
    assert "No such file" in refused(capsys, "serve", "--config", str(tmp_path / "none.yaml"))
    (tmp_path / "odd.yaml").write_text("applications: 3")
    said = refused(capsys, "serve", "--config", str(tmp_path / "odd.yaml"))
    assert "applications: expected a list of one" in said


def test_serve_refuses_a_port_that_is_taken_even_by_one_who_shares():
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} is in use by another program"):
            read_plan(default_config(), [f"http.port={port}"])
    check_port("127.0.0.1", port)


def test_serve_refuses_stores_that_do_not_answer_before_ray_starts(capsys):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        settings = [
            "http.port=0",
            "storage.backend=redis",
            f"storage.redis.url=redis://{address}/0",
            "storage.redis.timeout_s=0.5",
        ]
        words = [word for setting in settings for word in ("--set", setting)]
        assert address in refused(capsys, "serve", *words)


def test_the_config_file_of_a_cluster_is_one():
    file = ROOT / "deployments" / "cluster.yaml"
    assert f"| `{file.name}` |" in (file.parent / "README.md").read_text()
    app = read_yaml(file)["applications"][0]
    config = from_mapping(EchoConfig, app["args"])
    assert config.storage.backend == "tiered"
    assert config.storage.redis.password_env == "ECHO_REDIS_PASSWORD"
    options = {d["name"]: {k: v for k, v in d.items() if k != "name"} for d in app["deployments"]}
    assert options["GeneratorReplica"]["ray_actor_options"]["num_gpus"] == 1
    bound = application(app["args"], options=options)._bound_deployment
    assert bound.ray_actor_options["num_gpus"] == 1
    assert options["Router"]["num_replicas"] == 2
    scaling = bound._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 8)
    # All rules are written out, as they are by default; Serve's own delays would come on top.
    assert rules_of(scaling.policy.policy_kwargs) == Rules()
    assert set(scaling.policy.policy_kwargs) == set(Rules.__slots__)
    assert scaling.upscale_delay_s == scaling.downscale_delay_s == 0
    # Ray gets room for as many as there may be.
    assert ServePlan(app["args"], options).cpus == 8 + 2


def test_the_plan_is_the_config_file_with_its_settings_changed():
    plan = read_plan(default_config(), ["http.port=0", "storage.path=/tmp/x"])
    assert default_config().read_text() == (ROOT / "deployments" / "local.yaml").read_text()
    assert plan.args["http"] == {"host": "127.0.0.1", "port": 0}
    assert plan.args["storage"]["path"] == "/tmp/x"
    assert plan.options["GeneratorReplica"]["num_replicas"] == 2
    assert plan.cpus == 1.0
    bound = application(plan.args, options=plan.options)._bound_deployment
    assert (bound.name, bound.num_replicas) == ("GeneratorReplica", 2)


def test_serve_refuses_a_damaged_store_before_it_starts_anything(capsys, tmp_path):
    (tmp_path / "directory.sqlite3").write_bytes(b"x" * 10_000)
    said = refused(capsys, "serve", "--set", "http.port=0", "--set", f"storage.path={tmp_path}")
    assert "store_corrupt" in said
    assert "directory.sqlite3" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((" ",), "prompt_invalid: prompt is empty"),
        (("x" * 2001,), "prompt_invalid: prompt has 2001 characters; at most 2000"),
        (("a red ball", "--seed", "-1"), "seed"),
        (("a red ball", "--seconds", "0"), "--seconds 0.0"),
        (("a red ball", "--switch", "green"), "--switch 'green'"),
        (("a red ball", "--switch", "x=green"), "--switch 'x=green'"),
        (("a red ball", "--switch", "1=" + "x" * 2001), "switch has 2001 characters"),
        (("a red ball", "--out", "/nowhere/clip.mp4"), "its folder does not exist"),
    ],
)
def test_play_refuses(capsys, words, says):
    assert says in refused(capsys, "play", *words)


def test_play_writes_a_clip_and_a_sheet(capsys, tmp_path):
    out, sheet = tmp_path / "clip.mp4", tmp_path / "sheet.png"
    words = ["--seconds", "2", "--out", str(out), "--sheet", str(sheet), "--switch", "1=a red ball"]
    assert main(["play", "a green square on a black background", *words]) == 0
    said = capsys.readouterr().out
    assert "33 frames, 2.06 s of video" in said
    assert "not understood" not in said
    assert out.stat().st_size > 1000
    assert sheet.read_bytes().startswith(b"\x89PNG")


def test_play_says_once_for_each_prompt_what_was_not_understood(capsys, tmp_path):
    words = ["--seconds", "0.5", "--out", str(tmp_path / "clip.mp4")]
    switches = ["--switch", "0.5=a nice day", "--switch", "0.2=a blue ball"]
    assert main(["play", "A lovely red ball in a sunset", *words, *switches]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "understood" in line]
    assert said == [
        "not understood: lovely, sunset",
        "not understood: nice, day (from second 0.5)",
    ]


def test_play_goes_on_from_a_picture(capsys, tmp_path):
    picture, out = tmp_path / "first.png", tmp_path / "clip.mp4"
    Image.new("RGB", (80, 60), (10, 30, 200)).save(picture)
    words = ["a red ball", "--seconds", "1", "--out", str(out)]
    assert main(["play", *words, "--clip", str(picture)]) == 0
    assert "21 frames" in capsys.readouterr().out
    with av.open(str(out)) as container:
        first = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert abs(first.reshape(-1, 3).mean(0) - (10, 30, 200)).max() < 40
    picture.write_text("not a picture")
    assert "clip_invalid" in refused(capsys, "play", *words, "--clip", str(picture))
    assert "clip_invalid" in refused(capsys, "play", *words, "--clip", str(tmp_path / "none"))


def test_parity_refuses_a_device_that_is_not_there(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "no CUDA device" in refused(capsys, "parity", str(tmp_path), "--device", "cuda")


def test_parity_counts_and_fails_with_1(capsys, tmp_path):
    (tmp_path / "broken.json").write_text("{}")
    assert main(["parity", str(tmp_path)]) == 1
    assert "1 failed" in capsys.readouterr().out
    assert "no such folder" in refused(capsys, "parity", str(tmp_path / "none"))


def test_replicas_get_folders_that_hold_from_everywhere(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    shutil.copy(preset_folder("echo-tiny") / "preset.toml", tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    model = {"preset": "own", "weights": "some/weights", "threads": 2}
    given = application({"model": model}, options={})._bound_deployment.init_args[0]["model"]
    assert given == {
        "preset": str(tmp_path / "own"), "weights": str(tmp_path / "some/weights"), "threads": 2,
    }  # fmt: skip
    packaged = application({}, options={})._bound_deployment.init_args[0]["model"]
    assert packaged == {}


def test_deployments_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="'Rooter' is unknown; known: Router, GeneratorReplica"):
        application({}, options={"Rooter": {}})
    with pytest.raises(ConfigError, match="deployments: Router: "):
        application({}, options={"Router": {"speed": 3}})
    with pytest.raises(ModelUnknown):
        application({"model": {"preset": "none"}}, options={})


@pytest.fixture
def snapshot_file(tmp_path):
    weights = np.arange(6, dtype=np.float32)
    tensors = {
        "window.keys": Buffer("float32", (2, 3), weights.tobytes()),
        "step": Buffer("int64", (), bytes(8)),
    }
    snapshot = Snapshot("echo-tiny/cpu", {"chunk_index": 8, "prompts": {"now": "a"}}, tensors)
    file = tmp_path / "point.snap"
    file.write_bytes(encode(snapshot))
    return file


def test_snapshot_inspect_shows_what_is_inside(capsys, snapshot_file):
    assert main(["snapshot", "inspect", str(snapshot_file)]) == 0
    out = capsys.readouterr().out
    assert f"{snapshot_file.stat().st_size} bytes, digest matches" in out
    assert "fingerprint  echo-tiny/cpu" in out
    assert "  chunk_index: 8\n" in out
    assert "    now: 'a'\n" in out
    assert "tensors      2, 32 bytes" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["window.keys", "float32", "24", "bytes", "2", "x", "3"] in lines
    assert ["step", "int64", "8", "bytes", "scalar"] in lines


def test_snapshot_inspect_refuses_what_is_not_whole(capsys, snapshot_file, tmp_path):
    whole = snapshot_file.read_bytes()
    damaged = {
        "snapshot_truncated": whole[:-5],
        "snapshot_corrupt": whole[:-1] + bytes([whole[-1] ^ 1]),
        "snapshot_foreign": b"PNG" * 40,
    }
    for code, blob in damaged.items():
        snapshot_file.write_bytes(blob)
        said = refused(capsys, "snapshot", "inspect", str(snapshot_file))
        assert said.startswith(f"echo-ray: {code}: ")
    said = refused(capsys, "snapshot", "inspect", str(tmp_path / "none"))
    assert "No such file" in said
    with pytest.raises(SystemExit, match="2"):
        main(["snapshot", "destroy", "x"])


def test_serve_refuses_access_whose_secrets_are_missing(capsys, tmp_path, monkeypatch):
    file = tmp_path / "cluster.yaml"
    text = (ROOT / "deployments" / "cluster.yaml").read_text()
    file.write_text(text.replace("/etc/echo-ray/access", str(tmp_path)))
    settings = [
        "http.port=0",
        "http.host=127.0.0.1",
        "model.weights=null",
        "storage.backend=local",
        "model.preset=echo-tiny",
        "model.device=cpu",
        f"storage.path={tmp_path}/store",
    ]
    words = ["serve", "--config", str(file), *(w for s in settings for w in ("--set", s))]
    assert f"access.tokens_file: {tmp_path}/tokens cannot be read" in refused(capsys, *words)
    (tmp_path / "tokens").write_text(
        "tokens: [{name: a, tenant: acme, roles: [user], token: 0123456789abcdefghij}]"
    )
    assert f"access.viewer_secret_file: {tmp_path}/viewer-secret" in refused(capsys, *words)
    (tmp_path / "viewer-secret").write_text("short")
    said = refused(capsys, *words)
    assert "shorter than 32 characters" in said
    assert "openssl rand" in said
    for setting in ("access.viewer_secret_file=null", "access.viewer_secret_env=NOT_SET"):
        words += ["--set", setting]
    assert "access.viewer_secret_env: the variable NOT_SET is not set" in refused(capsys, *words)
    monkeypatch.setenv("NOT_SET", "v" * 32)
    assert f"access.replica_secret_file: {tmp_path}/replica-secret" in refused(capsys, *words)
