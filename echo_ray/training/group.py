"""Several processes that train one model, one on each GPU, with nothing shared but gradients.

    torchrun --nproc-per-node 8 $(which echo-ray) train --config pretrain --set run.device=cuda

Every process runs the same stage from the same weights, draws its data by its own rank, and the
first one alone builds banks, writes and shows progress. No module is wrapped, so checkpoints keep
their keys. A Ray Train worker has joined its group before its train loop calls `train`, and is
taken as it is. A resumed group goes on from the first process's checkpoint; bits repeat only for a
process alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from echo_ray.errors import ConfigError


def process_rank() -> int:
    """Which of several processes this is; 0 for one alone."""
    return torch.distributed.get_rank() if _in_a_group() else 0


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients over all processes; alone, nothing happens."""
    if not _in_a_group():
        return
    world = torch.distributed.get_world_size()
    for parameter in parameters:
        if parameter.grad is None:
            # Every process must take part, or those that have a gradient wait for ever.
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad.div_(world)


@contextmanager
def training_group() -> Iterator[None]:
    """Join the group that torchrun's environment announces, if it does, and leave it at the end.

    Raises `ConfigError` if the environment is incomplete.
    """
    if _in_a_group() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} are not set: "
            "start the processes with torchrun, or unset WORLD_SIZE for one alone"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def first_process_first() -> Iterator[None]:
    """The body runs in the first process, and only then, all at once, in the others."""
    if process_rank():
        wait_for_all()
    yield
    if _in_a_group() and not process_rank():
        wait_for_all()


def wait_for_all() -> None:
    """Go on when every process of the group has come here."""
    if _in_a_group():
        torch.distributed.barrier()


def refuse_minutes(minutes: float | None) -> None:
    """A group needs a number of steps: clocks differ, and the last process would wait for ever."""
    if minutes is not None and _in_a_group() and torch.distributed.get_world_size() > 1:
        raise ConfigError(
            f"run.minutes: {minutes} is not allowed in a group of "
            f"{torch.distributed.get_world_size()} processes; give run.steps",
            param="run.minutes",
        )


def _in_a_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
