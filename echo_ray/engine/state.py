"""A session's state as a value, and its way into a snapshot and back.

The compact state is all that travels: sink and history latents, the memory's query, what is left of
a given clip, counters, prompts with their encoded rows, and the drift baseline. Keys, values and
decoder caches are derived from it. Encoded rows travel because they are small (a megabyte for a
usual prompt of the 1.3B model) beside the encoder that makes them (eleven gigabytes): a stream
goes on without it, and on whatever device it was encoded.

Shapes: P prompt rows, E text width, G given latents.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from echo_ray.engine.decoding import Decoder
from echo_ray.engine.drift import NUMBERS, DriftState
from echo_ray.engine.generator import LatentState
from echo_ray.engine.lanes import Lanes, Span
from echo_ray.errors import SnapshotCorrupt
from echo_ray.session.snapshot import DTYPE_BYTES, Buffer, Snapshot

HEADER = {"kind", "prompt", "sink_prompt"}
KIND = "session"
TENSORS = {"counters", "drift", "given", "history", "prompt_rows", "sink", "sink_prompt_rows"}
MEMORY = "memory_query"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and its encoded rows [1, P, E], without those that are zero at the end."""

    text: str
    rows_BPE: Tensor


@dataclass(slots=True)
class SessionState:
    """Everything that makes a session go on. Only a step changes it."""

    seed: int
    prompt: Prompt
    sink_prompt: Prompt
    """What the sink's keys were computed under."""
    given_BGChw: Tensor
    """Latents of a given clip whose turn is still to come, whole chunks of them."""
    latent: LatentState
    decoder: Decoder
    drift: DriftState
    point_every: int
    fingerprint: str
    """Of the engine when it was opened or loaded: how all of it was rounded."""
    whole: bool = True
    """False from the begin of a step to its end, and for ever if it does not come to one."""
    spans: list[tuple[str, Span]] = field(default_factory=list)
    """Measurements of stages that were not over when their chunk was there; not saved."""

    @property
    def next_index(self) -> int:
        return self.latent.next_chunk

    @property
    def at_point(self) -> bool:
        every = self.point_every
        return self.next_index == 0 or (every > 0 and self.next_index % every == 0)


@dataclass(frozen=True, slots=True)
class CompactState:
    """What a snapshot holds, unpacked and checked for presence, not yet for geometry."""

    prompt: Prompt
    sink_prompt: Prompt
    seed: int
    next_chunk: int
    has_history: bool
    sink_first: int
    sink: Tensor
    history: Tensor
    given: Tensor
    query: Tensor | None
    drift: DriftState


def pack(state: SessionState, fingerprint: str, lanes: Lanes) -> Callable[[], Snapshot]:
    """Start to make the snapshot of a state at a point; call what is returned for it.

    A step never writes to the tensors that are packed here: it replaces them. So those of this
    moment stay what they are, while they are copied and until they are packed. Counters have a
    fixed width, so no age shows in the snapshot.
    """
    latent = state.latent
    counters = [latent.next_chunk, state.seed, int(latent.has_history), latent.sink_first]
    tensors = {
        "counters": torch.tensor(counters, dtype=torch.int64),
        "drift": torch.tensor(state.drift.to_numbers(), dtype=torch.float64),
        "given": state.given_BGChw,
        "history": latent.history_BFCHW,
        "prompt_rows": state.prompt.rows_BPE,
        "sink": latent.sink_BFCHW,
        "sink_prompt_rows": _rows_of_their_own(state),
    }
    if latent.query_BMC is not None:
        tensors[MEMORY] = latent.query_BMC
    header = {
        "kind": KIND,
        "prompt": state.prompt.text,
        "sink_prompt": state.sink_prompt.text,
    }
    names, copy = tuple(tensors), lanes.snapshot(tuple(tensors.values()))

    def packed() -> Snapshot:
        buffers = {name: to_buffer(t) for name, t in zip(names, copy.wait(), strict=True)}
        return Snapshot(fingerprint, header, buffers)

    return packed


def _rows_of_their_own(state: SessionState) -> Tensor:
    """The sink prompt's rows; none where it is the prompt that stands."""
    rows = state.sink_prompt.rows_BPE
    return rows[:, :0] if state.sink_prompt.text == state.prompt.text else rows


def unpack(snapshot: Snapshot, *, with_memory: bool) -> CompactState:
    """Read a snapshot's parts. Raises `SnapshotCorrupt` on a missing or surplus key."""
    tensors = TENSORS | ({MEMORY} if with_memory else set())
    _same_keys("header", set(snapshot.header), HEADER)
    _same_keys("tensors", set(snapshot.tensors), tensors)
    header = snapshot.header
    if header["kind"] != KIND or not all(isinstance(header[k], str) for k in HEADER):
        raise SnapshotCorrupt(f"snapshot header is not a session's: {_shown(header)}")
    counters = _numbers(snapshot, "counters", "int64", 4)
    drift = _numbers(snapshot, "drift", "float64", NUMBERS)
    next_chunk, seed, has_history, sink_first = (int(c) for c in counters)
    if next_chunk < 0 or seed < 0 or sink_first < 0 or has_history not in (0, 1):
        raise SnapshotCorrupt(f"snapshot counters are out of range: {counters}")
    prompt = Prompt(header["prompt"], to_tensor(snapshot.tensors["prompt_rows"]))
    sink_prompt = prompt
    if header["sink_prompt"] != prompt.text:
        rows = to_tensor(snapshot.tensors["sink_prompt_rows"])
        sink_prompt = Prompt(header["sink_prompt"], rows)
    return CompactState(
        prompt=prompt,
        sink_prompt=sink_prompt,
        seed=seed,
        next_chunk=next_chunk,
        has_history=bool(has_history),
        sink_first=sink_first,
        sink=to_tensor(snapshot.tensors["sink"]),
        history=to_tensor(snapshot.tensors["history"]),
        given=to_tensor(snapshot.tensors["given"]),
        query=to_tensor(snapshot.tensors[MEMORY]) if with_memory else None,
        drift=DriftState.from_numbers(drift),
    )


def to_buffer(tensor: Tensor) -> Buffer:
    """A tensor's bytes, little-endian and row-major."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES or sys.byteorder != "little":
        raise SnapshotCorrupt(f"tensors of dtype {name} are not stored on this machine")
    plain = tensor.detach().to("cpu").contiguous().reshape(-1)
    return Buffer(name, tuple(tensor.shape), plain.view(torch.uint8).numpy().tobytes())


def to_tensor(buffer: Buffer) -> Tensor:
    dtype = getattr(torch, buffer.dtype)
    if not buffer.data:
        return torch.zeros(buffer.shape, dtype=dtype)
    flat = torch.from_numpy(np.frombuffer(buffer.data, dtype=np.uint8).copy())
    return flat.view(dtype).reshape(buffer.shape)


def _numbers(snapshot: Snapshot, name: str, dtype: str, count: int) -> list[float]:
    buffer = snapshot.tensors[name]
    if buffer.dtype != dtype or buffer.shape != (count,):
        raise SnapshotCorrupt(f"snapshot tensor {name!r} is {buffer.dtype} {buffer.shape}")
    values: list[float] = to_tensor(buffer).tolist()
    return values


def _same_keys(what: str, actual: set[str], expected: set[str]) -> None:
    if actual != expected:
        missing, surplus = sorted(expected - actual), sorted(actual - expected)
        raise SnapshotCorrupt(f"snapshot {what}: missing {missing}, surplus {surplus}")


def _shown(header: Mapping[str, Any]) -> str:
    return str(dict(header))[:200]
