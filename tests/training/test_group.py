"""Several processes that train one model: real ones, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ports import free_port
from torch import nn

from echo_ray.errors import ConfigError
from echo_ray.training.group import all_reduce_gradients, training_group

WORKER = """
import os, sys
from pathlib import Path
import torch
from training_rig import small_stage
from echo_ray.errors import ConfigError
from echo_ray.training.group import first_process_first, process_rank, training_group
from echo_ray.training.budget import Budget
from echo_ray.training.loop import run_stage

torch.set_num_threads(1)
out = Path(sys.argv[1])
with training_group():
    rank = process_rank()
    with first_process_first():
        assert rank == 0 or (out / "ready").exists()
        (out / "ready").touch()
    stage = small_stage("pretrain")
    progress = run_stage(
        stage, Budget(steps=3), 7, out / "stage", resume=False, checkpoint_every_s=1e9
    )
    assert (out / "stage" / "checkpoint.pt").exists()
    model = {name: value.clone() for name, value in stage.model.state_dict().items()}
    try:
        run_stage(
            stage, Budget(steps=3, minutes=0.001), 7, out / "timed", resume=False,
            checkpoint_every_s=1e9,
        )
        refused = ""
    except ConfigError as error:
        refused = error.message
    assert (torch.distributed.is_initialized()) == ("group of 2 processes" in refused), refused
    torch.save({"model": model, "curves": progress.curves}, out / f"{rank}.pt")
"""


def run_group(world: int, out: Path) -> list[dict[str, object]]:
    """Train three steps in so many processes; what each one ends with."""
    port = str(free_port())
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    out.mkdir()
    started = []
    for rank in range(world):
        place = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        env = {**os.environ, **place, "MASTER_PORT": port, "PYTHONPATH": paths}
        words = [sys.executable, "-c", WORKER, str(out)]
        started.append(subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True))
    try:
        for process in started:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.timeout(450)
def test_a_group_learns_one_model_from_different_data(tmp_path: Path) -> None:
    first, second = run_group(2, tmp_path / "two")
    (alone,) = run_group(1, tmp_path / "one")
    same, other = first["model"], second["model"]
    assert isinstance(same, dict)
    assert isinstance(other, dict)
    assert all(torch.equal(value, other[name]) for name, value in same.items())
    assert first["curves"] != second["curves"], "each process draws clips of its own"
    assert any(not torch.equal(v, same[n]) for n, v in alone["model"].items())  # type: ignore[attr-defined]


def test_one_process_keeps_its_gradients_and_several_share_them(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    layer.weight.grad = torch.ones(2, 2)
    all_reduce_gradients(layer.parameters())
    assert layer.bias.grad is None
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        with training_group():
            all_reduce_gradients(layer.parameters())
        assert torch.distributed.is_initialized(), "a group that was joined before is not left"
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(layer.weight.grad, torch.ones(2, 2))
    # What one process has no gradient for, another may have one for.
    assert layer.bias.grad is not None
    assert not layer.bias.grad.any()


def test_a_group_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with (
        pytest.raises(ConfigError, match=r"WORLD_SIZE is 8, but RANK, MASTER_ADDR, .*torchrun"),
        training_group(),
    ):
        pass
