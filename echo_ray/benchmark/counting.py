"""What a stretch of work asks of the device: operations, bytes, and reads back to the host."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = frozenset((torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape))
"""Marks of operations that make the host wait for a number of the device."""
_FREE = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "detach"))


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs inside it: `ops` and `size_bytes` of all that is no view, and `reads`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops = 0
        self.size_bytes = 0
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Without gradients operations arrive here before they are taken apart.
        with self:
            out = func.decompose(*args, **(kwargs or {}))
        if out is not NotImplemented:
            return out
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given, made = _tensors((args, kwargs)), _tensors(out)
        if HOST_READS & set(func.tags) or _fetches(name, given, made):
            self.reads[name] += 1
        if not _is_view(func) and name not in _FREE:
            self.ops += 1
            # Operations that write into what they were given return it: counted once as made.
            written = {id(t) for t in made}
            read = [t for t in given if id(t) not in written]
            self.size_bytes += sum(t.numel() * t.element_size() for t in (*read, *made))
        return out


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _is_view(func: Any) -> bool:
    """Whether the schema says that a result shares memory with an argument it does not write."""
    returns = func._schema.returns
    aliases = [r.alias_info for r in returns if r.alias_info is not None]
    return bool(aliases) and not any(a.is_write for a in aliases)


def _fetches(name: str, given: list[Tensor], made: list[Tensor]) -> bool:
    """Whether this copies from a device to the host."""
    copies = name in ("_to_copy", "copy_")
    return (
        copies
        and any(t.device.type == "cpu" for t in made)
        and any(t.device.type != "cpu" for t in given)
    )
