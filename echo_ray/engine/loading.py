"""States of the sessions that come to a device: new ones, and those loaded from a snapshot.

Both are made in slices. What a state holds, its window's arena and its decoder's place, is given
back if it does not come to its end: a slice fails, or the rest is left.

Shapes: B batch (1 here), F latent frames, G given latents, C H W latent, N pixel frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from echo_ray.engine.decoding import Decoders
from echo_ray.engine.drift import DriftState
from echo_ray.engine.generator import Generator, LatentState
from echo_ray.engine.noise import SEED_LIMIT
from echo_ray.engine.prompts import padded
from echo_ray.engine.room import Room
from echo_ray.engine.slices import Slices
from echo_ray.engine.state import CompactState, Prompt, SessionState, unpack
from echo_ray.errors import InvalidRequestError, SnapshotCorrupt, SnapshotForeign
from echo_ray.preset import Preset
from echo_ray.session.engine_port import StreamShape
from echo_ray.session.snapshot import Snapshot
from echo_ray.weights.modules import Modules


class Arrivals:
    """Makes the states of one engine's sessions. Not thread-safe, as the engine is not."""

    def __init__(
        self,
        preset: Preset,
        modules: Modules,
        generator: Generator,
        decoders: Decoders,
        *,
        room: Room,
        look_up: Callable[[str], Prompt],
        fingerprint: Callable[[], str],
        shape: StreamShape,
    ) -> None:
        """`look_up`: a prompt's rows; `fingerprint`: the engine's of this moment."""
        self.decoders = decoders
        self._preset = preset
        self._modules = modules
        self._generator = generator
        self._room = room
        self._look_up = look_up
        self._fingerprint = fingerprint
        self._shape = shape

    def opening(self, prompt: str, seed: int, first_frames: bytes) -> Slices[SessionState]:
        """Point 0 of a new session: its prompt, its clip, its state."""
        if not 0 <= seed < SEED_LIMIT:
            raise InvalidRequestError(
                f"seed {seed} is not from 0 to {SEED_LIMIT - 1}", param="seed"
            )
        # Asked before each slice: others may have come in between.
        with self._room.taken(self.left()):
            written = self._look_up(prompt)
        yield
        with self._room.taken(self.left()):
            given = self._encoded(first_frames)
        yield
        with self._room.taken(self.left()):
            latent = self._generator.start(self._embed(written))
            return self._state(written, written, seed, latent, given, DriftState())

    def loading(self, snapshot: Snapshot) -> Slices[SessionState]:
        """The state that a snapshot is of: its parts, the window, the decoder's past."""
        fingerprint = self._fingerprint()
        ours, theirs = fingerprint.rsplit("/", 1)[0], snapshot.fingerprint.rsplit("/", 1)[0]
        if ours != theirs:
            raise SnapshotForeign(f"snapshot is of model {theirs!r}; this engine runs {ours!r}")
        compact = unpack(snapshot, with_memory=self._modules.memory is not None)
        with self._room.taken(self.left()):
            rows = self._embed(self._checked("prompt_rows", compact.prompt))
            given = self._given(compact)
            latent = self._generator.start(rows)
            state = self._state(
                compact.prompt, compact.sink_prompt, compact.seed, latent, given, compact.drift
            )
            with self._closed_unless_made(state):
                self._fill(latent, compact)
                if not state.at_point:
                    raise SnapshotCorrupt(f"snapshot of chunk {state.next_index} is not at a point")
                if state.next_index:
                    yield
                    yield from self._generator.rebuilding(latent)
                    made = state.next_index * self._preset.cache.frames_per_chunk
                    latest = latent.history_BFCHW
                    yield from self.decoders.rebuilding(state.decoder, latest, made)
        return state

    def left(self) -> list[str]:
        """Parts of a session that others have left and that wait for the next."""
        free = {"window": self._generator.arenas.free, "decoder": self.decoders.free}
        return [name for name, count in free.items() if count]

    def close(self, state: SessionState) -> None:
        """Give back what a state holds; twice does no harm."""
        self._generator.close(state.latent)
        self.decoders.close(state.decoder)

    @contextmanager
    def _closed_unless_made(self, state: SessionState) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # Slices that are left end here, too, by `GeneratorExit`.
            self.close(state)
            raise

    def _fill(self, latent: LatentState, compact: CompactState) -> None:
        """Bring a new stream to the compact state, but for its window; checks the geometry."""
        latent.sink_prompt = latent.prompt
        if compact.sink_prompt.text != compact.prompt.text:
            rows = self._embed(self._checked("sink_prompt_rows", compact.sink_prompt))
            latent.sink_prompt = self._modules.dit.encode_prompt(rows)
        shape, cache = self._preset.dit, self._preset.cache
        done = compact.next_chunk * cache.frames_per_chunk
        tail = (shape.in_channels, shape.latent_height, shape.latent_width)
        latent.sink_BFCHW = self._fitting(
            "sink", compact.sink, (1, min(done, cache.sink_frames), *tail)
        )
        kept = min(done, self._generator.history_frames)
        latent.history_BFCHW = self._fitting("history", compact.history, (1, kept, *tail))
        if latent.query_BMC is not None and compact.query is not None:
            expected = tuple(latent.query_BMC.shape)
            latent.query_BMC = self._fitting("memory_query", compact.query, expected)
        latent.has_history = compact.has_history
        latent.sink_first = compact.sink_first
        latent.next_chunk = compact.next_chunk

    def _fitting(self, name: str, tensor: Tensor, expected: tuple[int, ...]) -> Tensor:
        if tuple(tensor.shape) != expected or tensor.dtype != self._generator.dtype:
            raise SnapshotCorrupt(
                f"snapshot tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"expected {self._generator.dtype} {expected}"
            )
        return tensor.to(self._generator.device)

    def _checked(self, name: str, prompt: Prompt) -> Prompt:
        """A prompt out of a snapshot, its rows on the device."""
        rows, dit = prompt.rows_BPE, self._preset.dit
        count = rows.shape[1] if rows.dim() == 3 else 0
        expected = (1, min(max(count, 1), dit.text_len), dit.text_dim)
        return Prompt(prompt.text, self._fitting(name, rows, expected))

    def _given(self, compact: CompactState) -> Tensor:
        """What is left of a clip, whole chunks of it, on the device."""
        given, shape = compact.given, self._preset.dit
        count = given.shape[1] if given.dim() == 5 else 0
        count -= count % self._preset.cache.frames_per_chunk
        tail = (shape.in_channels, shape.latent_height, shape.latent_width)
        return self._fitting("given", given, (1, count, *tail))

    def _encoded(self, first_frames: bytes) -> Tensor:
        """Latents [1, G, C, h, w] of a clip of whole chunks; none of an empty one."""
        shape, dit = self._shape, self._preset.dit
        size = shape.height * shape.width * 3
        count = len(first_frames) // size
        whole = (count - shape.first_chunk_frames) % shape.frames_per_chunk == 0
        if first_frames and (
            len(first_frames) % size or count < shape.first_chunk_frames or not whole
        ):
            raise InvalidRequestError(
                f"first_frames: {len(first_frames)} bytes are not whole chunks of "
                f"{shape.width} x {shape.height} frames; give {shape.first_chunk_frames} frames "
                f"and any number of times {shape.frames_per_chunk} more",
                param="first_frames",
            )
        device, dtype = self._generator.device, self._generator.dtype
        if not first_frames:
            tail = (dit.in_channels, dit.latent_height, dit.latent_width)
            return torch.zeros(1, 0, *tail, device=device, dtype=dtype)
        pixels = torch.frombuffer(bytearray(first_frames), dtype=torch.uint8)
        frames = pixels.view(1, count, shape.height, shape.width, 3).permute(0, 1, 4, 2, 3)
        scaled = frames.to(device, torch.float32) / 255.0
        return self._modules.codec.encode(scaled.to(dtype))

    def _state(
        self,
        prompt: Prompt,
        sink_prompt: Prompt,
        seed: int,
        latent: LatentState,
        given: Tensor,
        drift: DriftState,
    ) -> SessionState:
        every = self._preset.cache.point_every
        decoder, made_under = self.decoders.start(), self._fingerprint()
        return SessionState(
            seed, prompt, sink_prompt, given, latent, decoder, drift, every, made_under
        )

    def _embed(self, prompt: Prompt) -> Tensor:
        return padded(prompt, self._preset.dit.text_len)
