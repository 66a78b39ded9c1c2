"""The four verbs between the service and a device, as a protocol.

The service drives any engine through this and never learns what is inside a state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from echo_ray.preset import Preset
from echo_ray.session.chunk import Chunk
from echo_ray.session.snapshot import Snapshot


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamShape:
    """What a viewer has to know of a model's frames."""

    model: str
    fps: int
    width: int
    height: int
    frames_per_chunk: int
    first_chunk_frames: int
    point_every: int
    """K: the state is consolidated, and can be saved, at chunk indices divisible by this."""

    def frames_in(self, index: int) -> int:
        return self.first_chunk_frames if index == 0 else self.frames_per_chunk

    def first_frame(self, index: int) -> int:
        """Frames of the stream before chunk `index`."""
        if index == 0:
            return 0
        return self.first_chunk_frames + (index - 1) * self.frames_per_chunk

    def start_s(self, index: int) -> float:
        """Media time at which chunk `index` begins."""
        return self.first_frame(index) / self.fps

    @property
    def chunk_s(self) -> float:
        return self.frames_per_chunk / self.fps


def stream_shape(preset: Preset) -> StreamShape:
    """The shape of a preset's frames, known without loading its weights."""
    return StreamShape(
        model=preset.name,
        fps=preset.fps,
        width=preset.width,
        height=preset.height,
        frames_per_chunk=preset.frames_per_chunk,
        first_chunk_frames=preset.first_chunk_frames,
        point_every=preset.cache.point_every,
    )


class State(Protocol):
    """A session's state between two steps: everything that makes it go on, opaque but for these."""

    @property
    def next_index(self) -> int:
        """Index of the chunk that the next step generates."""
        ...

    @property
    def at_point(self) -> bool:
        """Whether this is a consolidation point, where `save` is possible."""
        ...


class Step(Protocol):
    """A chunk in the making, in slices between which the device may work for other sessions.

    What is made does not depend on what comes between. A step may be left where it is: nobody saw
    anything of it. Its state is lost then; load it again.
    """

    def advance(self) -> Chunk | None:
        """Do the next slice; the chunk once it was the last one.

        Raises `EngineError` when a slice fails, which leaves the state unusable, and behind the
        last one.
        """
        ...


class Loading(Protocol):
    """A state in the making, in slices like those of a `Step`."""

    def advance(self) -> State | None:
        """Do the next slice; the state once it was the last one.

        Raises what `Engine.open` or `Engine.load` raises, `EngineError` when the device fails in a
        slice and behind the last one. What was made until then is given back.
        """
        ...

    def close(self) -> None:
        """Leave it where it is, and give back what it holds; twice, or behind the last slice, does
        no harm. Without it what it held is not used again."""
        ...


class Engine(Protocol):
    """One device. Not thread-safe: one thread calls it."""

    @property
    def shape(self) -> StreamShape: ...

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints produce equal bits: model, weights, dtype, device, threads, code."""
        ...

    def open(self, prompt: str, seed: int, first_frames: bytes = b"") -> State:
        """Point 0 of a new session. Raises `PromptError`, `InvalidRequestError`.

        `first_frames`: a clip that becomes the first chunks, uint8 RGB [N, H, W, 3] row-major of
        the stream's own size; generation goes on behind it. Refused unless it is whole chunks.
        """
        ...

    def begin_open(self, prompt: str, seed: int, first_frames: bytes = b"") -> Loading:
        """Begin to open: the prompt, the clip and the state a slice each; raises nothing yet."""
        ...

    def begin(self, state: State, prompts: Sequence[str] = ()) -> Step:
        """Begin to generate chunk `state.next_index`; the state is advanced by it at the end.

        `prompts`: the switches pinned to this chunk, in log order (the last one stands). Until the
        step gives the chunk, nothing else may be asked of the state, its attributes included; a
        second step or a `save` is refused with `EngineError`. So is a state whose step was left or
        failed. The chunk's `ignored_words` follow from its prompt alone, so they are the same
        whoever generates it.
        """
        ...

    def step(self, state: State, prompts: Sequence[str] = ()) -> Chunk:
        """All slices of `begin` in one go."""
        ...

    def saving(self, state: State) -> Callable[[], Snapshot]:
        """Start to save; what is returned waits for the snapshot, once and on any thread.

        The state may be stepped on at once: the snapshot is of the state as it is now. Raises
        `EngineError` unless the state is at a point.
        """
        ...

    def save(self, state: State) -> Snapshot:
        """The state as a value: `saving`, waited for."""
        ...

    def load(self, snapshot: Snapshot) -> State:
        """The state that `save` was given. Raises `SnapshotError` on any part that does not fit."""
        ...

    def begin_load(self, snapshot: Snapshot) -> Loading:
        """Begin to load, a forward or a latent of the decoder a slice; raises nothing yet."""
        ...

    def close(self, state: State) -> None:
        """Give back what a state holds, which cannot be used any more; twice does no harm.

        A state that is dropped without it is freed, but what it held is not used again.
        """
        ...

    def state_bytes(self, state: State) -> int:
        """Memory of a state, window and decoder included."""
        ...

    def fallbacks(self) -> Mapping[str, int]:
        """Calls by kernel that ran its plain form, because it had failed on this device.

        Under `cuda_graph`, recordings that could not be made: those forwards run eagerly.
        """
        ...

    def memory(self) -> Mapping[str, int]:
        """Bytes that the engine takes, by a few fixed kinds."""
        ...
