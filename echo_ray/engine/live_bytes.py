"""The most bytes that a piece of work holds at once, counted and not measured.

On the meta device nothing is computed and nothing is allocated, so what a GPU would have to hold is
known before there is one. What a library's kernel takes for itself is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside of it, `peak` is the most that tensors made inside held at one time.

    In inference mode operations arrive whole, and what they hold inside is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._owners: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(t) for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = _storage(tensor)
            if storage in given and storage not in self._owners:
                continue
            size = tensor.untyped_storage().nbytes()
            if storage not in self._owners:
                self.live += size
            self._owners[storage] += 1
            weakref.finalize(tensor, self._gone, storage, size)
        self.peak = max(self.peak, self.live)
        return out

    def _gone(self, storage: int, size: int) -> None:
        self._owners[storage] -= 1
        if not self._owners[storage]:
            del self._owners[storage]
            self.live -= size


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
