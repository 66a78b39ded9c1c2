"""The discipline that a graph needs, checked on any device by running eagerly.

A recording here is the list of operations that ran, with everything that a graph would have fixed:
addresses, shapes and strides of what was there before, numbers, and the order of what came to be.
A replay runs the work again and refuses the first difference; so does whatever waits for the device
or outlives the call. Slow, for tests and debugging.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from echo_ray.engine.graphs import Recording, Work
from echo_ray.errors import EngineError

HOST_READS = frozenset((torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape))
"""Marks of operations whose result, or its size, the host has to wait for."""
CROSSINGS = ("_to_copy", "copy_", "lift_fresh")
"""Operations that can move data from one device to another."""

Operation = tuple[str, Any]


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operation as a graph would fix it. Raises `EngineError` for host reads."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self._made: dict[int, int] = {}
        self._alive: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Without gradients operations arrive here before they are taken apart.
        with self:
            whole = func.decompose(*args, **(kwargs or {}))
        if whole is not NotImplemented:
            return whole
        name = func.overloadpacket.__name__
        if _reads(func, args) or (name in CROSSINGS and _crosses(args, kwargs or {})):
            raise EngineError(f"operation {len(self.operations)}, {name}, waits for the device")
        self.operations.append((str(func), self._seen((args, kwargs or {}))))
        known = {_storage(t) for t in _tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = _storage(tensor)
            if storage not in known:
                # An address may be used again by what comes later.
                self._made[storage] = len(self.operations)
            if storage in self._made:
                self._alive.append(weakref.ref(tensor))
        return out

    def outliving(self, result: Tensor | None) -> list[Tensor]:
        """What was allocated inside and is still held, but for the result."""
        kept = None if result is None else _storage(result)
        alive = (ref() for ref in self._alive)
        return [t for t in alive if t is not None and _storage(t) != kept]

    def _seen(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            storage = _storage(value)
            made = self._made.get(storage)
            place = ("made by", made, value.storage_offset()) if made is not None else (
                "at", value.untyped_storage().data_ptr(), storage, value.storage_offset()
            )  # fmt: skip
            return (place, tuple(value.shape), value.stride(), str(value.dtype))
        if isinstance(value, list | tuple):
            return tuple(self._seen(part) for part in value)
        if isinstance(value, dict):
            return tuple((name, self._seen(part)) for name, part in sorted(value.items()))
        return repr(value)


class CheckedRecording:
    def __init__(self, operations: list[Operation]) -> None:
        self._operations = operations

    def replay(self, work: Work) -> Tensor | None:
        result, operations = _traced(work)
        pairs = zip(self._operations, operations, strict=False)
        for at, (recorded, found) in enumerate(pairs):
            if recorded != found:
                raise EngineError(
                    f"operation {at} was recorded as {recorded}, its replay is {found}: what "
                    "differs between replays belongs into a buffer"
                )
        if len(operations) != len(self._operations):
            raise EngineError(
                f"{len(self._operations)} operations were recorded, the replay has "
                f"{len(operations)}: give another layout a key of its own"
            )
        return result


class CheckedRecorder:
    """Implements `graphs.Recorder`; its failures are errors, so it counts none."""

    def __init__(self) -> None:
        self.failures = 0
        self.recorded = 0

    def record(self, work: Work) -> tuple[Tensor | None, Recording]:
        result, operations = _traced(work)
        self.recorded += 1
        return result, CheckedRecording(operations)


def _traced(work: Work) -> tuple[Tensor | None, list[Operation]]:
    with Trace() as trace:
        result = work()
    if left := trace.outliving(result):
        raise EngineError(
            f"{len(left)} tensors that were made inside outlive the call, the first of shape "
            f"{list(left[0].shape)}: a replay would not make them again"
        )
    return result, trace.operations


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _reads(func: Any, args: Any) -> bool:
    """Whether the host waits for it. Indices are places; only a mask's have to be counted."""
    if func.overloadpacket.__name__.startswith(("index", "_index", "_unsafe_index")):
        return any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1:2]))
    return not HOST_READS.isdisjoint(func.tags)


def _crosses(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation has tensors of several devices, or makes a copy on another one."""
    devices = {t.device.type for t in _tensors((args, kwargs))}
    wanted = kwargs.get("device")
    if wanted is not None:
        devices.add(getattr(wanted, "type", str(wanted)))
    return len(devices) > 1
