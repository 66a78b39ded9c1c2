"""Strict loading of tensors into modules: all of them, of the right shape, or a clear error."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from echo_ray.errors import WeightsError

_SHOWN = 8


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Make `tensors` the module's parameters and buffers, as they are: dtype, device, storage.

    Raises `WeightsError` listing what is missing, surplus or misshapen; nothing is then loaded.
    """
    own = module.state_dict()
    problems = [
        _names("missing", sorted(set(own) - set(tensors))),
        _names("surplus", sorted(set(tensors) - set(own))),
        _names(
            "misshapen",
            [
                f"{k} {tuple(tensors[k].shape)} for {tuple(own[k].shape)}"
                for k in sorted(set(own) & set(tensors))
                if tensors[k].shape != own[k].shape
            ],
        ),
    ]
    said = "; ".join(p for p in problems if p)
    if said:
        raise WeightsError(f"{what}: these weights do not fit: {said}")
    module.load_state_dict(dict(tensors), strict=True, assign=True)


def _names(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{rest}"
