"""What a snapshot may be loaded by: the identity of a model, and how its numbers are rounded."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch

from echo_kernels import check_choice
from echo_ray.model.computing import Computing, Precision
from echo_ray.preset import Preset
from echo_ray.weights.modules import Modules

CODE_EPOCH = 3
"""Raised whenever a change of code changes bits, or what a snapshot holds."""


def model_identity(preset: Preset, modules: Modules) -> str:
    """Name and hash of everything that decides what is computed, but for the device."""
    text = f"{asdict(preset)}|{modules.digest}|{CODE_EPOCH}"
    return f"{preset.name}/{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def numerics_of(
    device: torch.device,
    text: torch.device,
    threads: int,
    computing: Computing,
    failed: Sequence[str] = (),
) -> str:
    """Everything that decides how it is rounded: a hash, and before it a precision's name.

    `failed`: ops whose kernel has failed, so that their truth runs.
    """
    if device.type == "cuda":
        # Codecs lie channels last there, which rounds differently.
        kind = f"{torch.cuda.get_device_name(device)} channels_last"
        kind += " reference" if check_choice() else ""
    else:
        kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {threads}"
    all_of_it = f"{device.type}|{text.type}|{kind}|{torch.__version__}|{np.__version__}"
    all_of_it += f"|{computing}" if str(computing) else ""
    all_of_it += f"|without {','.join(failed)}" if failed else ""
    found = hashlib.sha256(all_of_it.encode()).hexdigest()[:12]
    return found if computing.precision is Precision.EXACT else f"{computing.precision}-{found}"
