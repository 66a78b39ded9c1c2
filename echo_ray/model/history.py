"""What causal layers saw before: read from one state, written to the next.

A layer asks for its past by its own key, so a state is a plain dict of tensors and the layers
hold weights only. A missing entry is a past of zeros, so a fresh state needs no sizes.

A state is a value: a step leaves the one it read alone and writes a new one. Only who owns a state,
and wants no other copy of it, steps in place: then every past is overwritten where it lies. A
stream's own buffers hold the past frames and nothing else. The input that a convolution reads, past
and new frames in one piece, is scratch of the step: kept for each session it would be 5 GB for the
published decoder instead of 1.9, and shared by sessions it would tie their device streams together.

Shapes: P past frames.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

BEGUN = "begun"
"""A state's flag, a host tensor, so that reading it never waits for a device."""


class History:
    """The pasts of one step of a stream."""

    def __init__(
        self,
        before: Mapping[str, Tensor],
        *,
        first: bool,
        time_dim: int,
        in_place: bool = False,
    ) -> None:
        """`in_place`: pasts take the place of those in `before`, at the same addresses."""
        self.first = first
        self.after: dict[str, Tensor] = dict(before) if in_place else {}
        self._before = before
        self._dim = time_dim

    @classmethod
    def of_stream(
        cls, state: Mapping[str, Tensor], time_dim: int, *, in_place: bool = False
    ) -> History:
        """The history of a decoder's next latent."""
        first = not bool(state[BEGUN])
        return cls(state, first=first, time_dim=time_dim, in_place=in_place)

    def past(self, key: str) -> Tensor | None:
        """The frames that the layer `key` saw last; None: zeros."""
        return self._before.get(key)

    def room(self, key: str, like: Tensor, frames: int) -> Tensor:
        """Where to put the last `frames` frames that the layer saw; in place it is its past."""
        if key not in self.after:
            self.after[key] = self._empty(like, frames)
        return self.after[key]

    def join(self, key: str, x: Tensor, frames: int) -> Tensor:
        """The last `frames` frames that the layer `key` saw, followed by `x`; keeps the newest."""
        past_P, new = self.past(key), x.shape[self._dim]
        joined = self._empty(x, frames + new)
        seen = joined.narrow(self._dim, 0, frames)
        if past_P is None:
            seen.zero_()
        else:
            seen.copy_(past_P)
        joined.narrow(self._dim, frames, new).copy_(x)
        self.keep(key, joined, frames)
        return joined

    def keep(self, key: str, x: Tensor, frames: int) -> None:
        """Note the last `frames` frames of `x` for the layer's next step."""
        newest = x.narrow(self._dim, x.shape[self._dim] - frames, frames)
        self.room(key, x, frames).copy_(newest)

    def state(self) -> dict[str, Tensor]:
        """The state after this step."""
        return {**self.after, BEGUN: begun_flag(True)}

    def _empty(self, like: Tensor, frames: int) -> Tensor:
        size = list(like.shape)
        size[self._dim] = frames
        return torch.empty(
            size, dtype=like.dtype, device=like.device, memory_format=layout_of(like)
        )


def layout_of(x: Tensor) -> torch.memory_format:
    """Channels last if five- or four-dimensional `x` lies so, else contiguous."""
    last = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
    lies_so = x.is_contiguous(memory_format=last) and not x.is_contiguous()
    return last if lies_so else torch.contiguous_format


def begun_flag(begun: bool) -> Tensor:
    """Whether a stream's first latent lies behind it, as a state holds it: on the host."""
    return torch.full((1,), int(begun), dtype=torch.uint8, device="cpu")
