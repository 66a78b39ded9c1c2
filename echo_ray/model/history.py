"""What causal layers saw before: read from one state, written to the next.

A layer asks for its past by its own key, so a state is a plain dict of tensors and the layers
hold weights only. A missing entry is a past of zeros, so a fresh state needs no sizes.

Shapes: P past frames.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

BEGUN = "begun"
"""A state's flag, a host tensor, so that reading it never waits for a device."""


class History:
    """The pasts of one step of a stream; the state it reads from is never changed."""

    def __init__(self, before: Mapping[str, Tensor], *, first: bool, time_dim: int) -> None:
        self.first = first
        self.after: dict[str, Tensor] = {}
        self._before = before
        self._dim = time_dim

    @classmethod
    def of_stream(cls, state: Mapping[str, Tensor], time_dim: int) -> History:
        """The history of a decoder's next latent."""
        return cls(state, first=not bool(state[BEGUN]), time_dim=time_dim)

    def join(self, key: str, x: Tensor, frames: int) -> Tensor:
        """The last `frames` frames that the layer `key` saw, followed by `x`; keeps the newest."""
        past_P = self._before.get(key)
        if past_P is None:
            size = list(x.shape)
            size[self._dim] = frames
            past_P = x.new_zeros(size)
        joined = torch.cat([past_P, x], dim=self._dim)
        self.keep(key, joined, frames)
        return joined

    def keep(self, key: str, x: Tensor, frames: int) -> None:
        """Note the last `frames` frames of `x` for the layer's next step."""
        # A copy, because a view would hold all of `x` in memory.
        self.after[key] = x.narrow(self._dim, x.shape[self._dim] - frames, frames).clone()

    def state(self) -> dict[str, Tensor]:
        """The state after this step."""
        return {BEGUN: begun_flag(True), **self.after}


def begun_flag(begun: bool) -> Tensor:
    """Whether a stream's first latent lies behind it, as a state holds it: on the host."""
    return torch.full((1,), int(begun), dtype=torch.uint8, device="cpu")
