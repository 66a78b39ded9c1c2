"""The way of a tensor from the host to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. A GPU takes it when it gets there: the host goes on at once."""
    if device.type != "cuda":
        return host.to(device)
    # Copies from other than pinned memory make the host wait for all that was launched before.
    return host.pin_memory().to(device, non_blocking=True)
