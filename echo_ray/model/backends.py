"""What computes attention: one signature, several libraries, chosen once for an engine.

FlashAttention is imported when it is chosen and no sooner. A choice is fixed for the life of an
engine and decides bits, so its label is part of the fingerprint.

Shapes: B batch, N query tokens, M key tokens, H heads, D head size, C = H * D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module, metadata, util
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from echo_ray.errors import BackendMissing, ConfigError, DeviceMissing, DeviceTooOld
from echo_ray.model.attention import Attend, attention
from echo_ray.model.attention8 import Attend8, Scales, plain8

KEY = "model.attention"
SPLITS = 1
"""Parts that FlashAttention 3 cuts the keys into. Left to itself it asks how busy the device is
going to be, and sums are taken in another order."""
EXACT_CUDNN = 91800
"""Older ones do not always repeat their bits on an H100."""
LARGEST_HEAD = 256

_FA3 = (("flash_attn_interface", "flash_attn_3"), ("fa3_fwd_interface", "fa3_fwd"))
_FA2 = (("flash_attn", "flash_attn"),)


@dataclass(frozen=True, slots=True)
class Machine:
    """What a choice depends on: a device's kind and name, and what it can compute."""

    kind: str
    name: str = ""
    capability: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        if device.type != "cuda":
            return cls(device.type)
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability
        return cls("cuda", name, capability(device))

    def require(self, key: str, what: str, least: tuple[int, int], remedy: str) -> None:
        """Raise `DeviceMissing` or `DeviceTooOld` unless the device is at least of that kind."""
        if self.kind != "cuda":
            raise DeviceMissing(
                f"{key}: {what} needs a CUDA device, model.device is {self.kind}; {remedy}",
                param=key,
            )
        if self.capability < least:
            raise DeviceTooOld(
                f"{key}: {what} needs compute capability {_dotted(least)}, {self.name} has "
                f"{_dotted(self.capability)}; {remedy}",
                param=key,
            )


@dataclass(frozen=True, slots=True)
class Attention:
    """A library's attention: `attend` takes q [B, N, H, D], k and v [B, M, H, D]; gives [B, N, C].

    `label` names the library, its version and whatever else decides its bits.
    """

    label: str
    attend: Attend
    attend8: Attend8 | None = None
    """The same in 8 bits, where the library has it."""


PLAIN = Attention("plain", attention, plain8)
"""What a CPU computes with."""


def choose8(name: str, machine: Machine, dtype: torch.dtype, head_dim: int) -> Attention:
    """As `choose`, of those that have `attend8`: FlashAttention 3, and plain products.

    On a GPU `auto` does not take the latter, which would be far slower than 16 bits.
    """
    wanted = "fa3" if name == "auto" and machine.kind == "cuda" else name
    found = choose(wanted, machine, dtype, head_dim)
    if found.attend8 is None:
        raise ConfigError(
            f"{KEY}: {name} has no 8 bits, which model.precision asks for; take fa3, or plain",
            param=KEY,
        )
    return found


def choose(name: str, machine: Machine, dtype: torch.dtype, head_dim: int) -> Attention:
    """The attention that a name of `ATTENTIONS` stands for, for a model of this dtype on a machine.

    `auto` is the first that can be had of FlashAttention 3, cuDNN, FlashAttention 2, PyTorch's
    flash kernel and plain products; on a CPU it is always the last. Raises `DeviceMissing`,
    `DeviceTooOld`, `BackendMissing`, and `ConfigError` for a model that the library cannot do.
    """
    if name == "auto":
        if machine.kind == "cuda":
            for each in ("fa3", "cudnn", "fa2", "flash"):
                try:
                    return choose(each, machine, dtype, head_dim)
                except ConfigError:
                    continue
        name = "plain"
    if name == "plain":
        if machine.kind == "cpu":
            return PLAIN
        return replace(_of_torch("plain", SDPBackend.MATH), attend8=plain8)
    build, least = _BUILDERS[name]
    machine.require(KEY, name, least, "take auto or plain")
    if dtype is not torch.bfloat16 or head_dim % 8 or head_dim > LARGEST_HEAD:
        raise ConfigError(
            f"{KEY}: {name} takes bfloat16 and head sizes that are multiples of 8 up to "
            f"{LARGEST_HEAD}, this model has {str(dtype).removeprefix('torch.')} and {head_dim}; "
            "take auto or plain",
            param=KEY,
        )
    return build(machine)


def _fa3(machine: Machine) -> Attention:
    if machine.capability[0] != 9:
        raise BackendMissing(
            f"{KEY}: fa3 has kernels for compute capability 9 only, {machine.name} has "
            f"{_dotted(machine.capability)}; take auto",
            param=KEY,
        )
    library, version = _imported("fa3", _FA3)

    def attend(q_BNHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
        out = library.flash_attn_func(q_BNHD, k_BMHD, v_BMHD, num_splits=SPLITS)
        return _alone(out).flatten(2)

    def attend8(q: Tensor, k: Tensor, v: Tensor, scales: Scales, kind: torch.dtype) -> Tensor:
        q_BH, k_BH, v_BH = (s.expand(q.shape[0], -1) for s in scales)
        out = library.flash_attn_func(
            q, k, v, q_descale=q_BH, k_descale=k_BH, v_descale=v_BH, num_splits=SPLITS
        )
        return _alone(out).to(kind).flatten(2)

    return Attention(f"fa3 {version} splits={SPLITS}", attend, attend8)


def _alone(made: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The result itself: builds of FlashAttention 3 until August 2025 add the softmax's sums."""
    return made[0] if isinstance(made, tuple) else made


def _fa2(machine: Machine) -> Attention:
    library, version = _imported("fa2", _FA2)

    def attend(q_BNHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
        out: Tensor = library.flash_attn_func(q_BNHD, k_BMHD, v_BMHD, deterministic=True)
        return out.flatten(2)

    return Attention(f"fa2 {version}", attend)


def _cudnn(machine: Machine) -> Attention:
    found = cudnn_version()
    if found < EXACT_CUDNN:
        raise BackendMissing(
            f"{KEY}: cudnn {found} does not always repeat its bits; install {EXACT_CUDNN} or "
            "newer, or take auto",
            param=KEY,
        )
    return _of_torch(f"cudnn {found}", SDPBackend.CUDNN_ATTENTION)


def cudnn_version() -> int:
    """As cuDNN numbers itself; 0 without it."""
    found: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return found or 0


def _flash(machine: Machine) -> Attention:
    return _of_torch("flash", SDPBackend.FLASH_ATTENTION)


def _of_torch(label: str, backend: SDPBackend) -> Attention:
    """One of PyTorch's kernels and no other; the label needs no version, PyTorch's is told."""

    def attend(q_BNHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attention(q_BNHD, k_BMHD, v_BMHD)

    return Attention(label, attend)


_BUILDERS: dict[str, tuple[Callable[[Machine], Attention], tuple[int, int]]] = {
    "fa3": (_fa3, (9, 0)),
    "fa2": (_fa2, (8, 0)),
    "cudnn": (_cudnn, (8, 0)),
    "flash": (_flash, (8, 0)),
}


def _imported(name: str, forms: Sequence[tuple[str, str]]) -> tuple[ModuleType, str]:
    """The first module that is installed and its distribution's version."""
    why = "is not installed"
    for module, distribution in forms:
        if util.find_spec(module) is None:
            continue
        try:
            return import_module(module), metadata.version(distribution)
        except (ImportError, OSError, RuntimeError, AttributeError) as e:
            # What is built for another PyTorch fails in any of these ways.
            why = f"does not load: {e}"
    wanted = " or ".join(distribution for _, distribution in forms)
    raise BackendMissing(
        f"{KEY}: {name} {why}; install {wanted} built for PyTorch {torch.__version__}, or take "
        "auto",
        param=KEY,
    )


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
