"""One device, many sessions, four verbs: open, step, save, load.

The engine knows nothing about networks, leases or viewers. A step is a pure function of the state,
the prompts pinned to it and the seed's noise, so whoever repeats it gets the same bits.

Shapes: B batch (1 here), F latent frames, C H W latent, N pixel frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from echo_kernels import fallbacks, frames_to_uint8
from echo_ray.engine.aside import aside_of
from echo_ray.engine.decoding import Decoders
from echo_ray.engine.drift import DriftState, frame_parts, latent_statistics, read_drift
from echo_ray.engine.fingerprint import model_identity, numerics_of
from echo_ray.engine.footprint import device_memory, state_bytes
from echo_ray.engine.generator import Generator, LatentState
from echo_ray.engine.graphs import CudaRecorder
from echo_ray.engine.lanes import Mark, lanes_of
from echo_ray.engine.noise import SEED_LIMIT, SessionNoise
from echo_ray.engine.prompts import PromptBook, padded
from echo_ray.engine.room import Room, room_of
from echo_ray.engine.rounding import Rounding
from echo_ray.engine.slices import Slices
from echo_ray.engine.state import CompactState, Prompt, SessionState, pack, unpack
from echo_ray.engine.step import EngineStep, Stages
from echo_ray.errors import (
    EngineError,
    InvalidRequestError,
    PromptError,
    SnapshotCorrupt,
    SnapshotForeign,
)
from echo_ray.preset import Preset
from echo_ray.session.chunk import Chunk, DriftReading, frames_digest, named_words
from echo_ray.session.engine_port import StreamShape, stream_shape
from echo_ray.session.snapshot import Snapshot
from echo_ray.weights.modules import Modules


class EchoEngine:
    """Implements `echo_ray.session.engine_port.Engine` on one torch device."""

    def __init__(
        self,
        preset: Preset,
        modules: Modules,
        device: torch.device,
        threads: int,
        *,
        prompts_kept: int = 64,
        text: torch.device | None = None,
        graphs: bool = True,
        room: Room | None = None,
    ) -> None:
        """`text`: where prompts are encoded, if not on `device`. `room`: None for the device's.

        `graphs`: replay forwards and decodings as CUDA graphs; without CUDA all run eagerly.
        """
        self._preset = preset
        self._modules = modules
        self._device = device
        self._threads = threads
        self._lanes = lanes_of(device)
        self._shape = stream_shape(preset)
        records = graphs and device.type == "cuda"
        self._generator = Generator(
            modules.dit,
            modules.memory,
            preset.cache,
            preset.sampler,
            modules.codec.rebuild_latents,
            recorder=CudaRecorder() if records else None,
            aside=aside_of(device),
        )
        # A recorder of its own: decodings run beside forwards, and recordings of one share memory.
        self._decoders = Decoders(modules.codec, self._lanes, CudaRecorder() if records else None)
        self._prompts = PromptBook(modules.text, prompts_kept)
        self._room = room or room_of(preset, device)
        identity, how = model_identity(preset, modules), (device, text or device, threads)
        self._rounding = Rounding(
            lambda failed: f"{identity}/{numerics_of(*how, modules.computing, failed)}"
        )

    @property
    def shape(self) -> StreamShape:
        return self._shape

    @property
    def fingerprint(self) -> str:
        """As `Engine.fingerprint`; another one once a kernel has failed, which rounds otherwise."""
        return self._rounding.fingerprint

    def fallbacks(self) -> Mapping[str, int]:
        """See `Engine.fallbacks`."""
        return fallbacks()

    def understood(self, prompt: str) -> tuple[list[str], list[str]]:
        """The prompt's words that the model knows, and those it ignores."""
        return self._modules.text.understood(prompt)

    def open(self, prompt: str, seed: int, first_frames: bytes = b"") -> SessionState:
        """Point 0 of a new session; see `Engine.open`."""
        if not 0 <= seed < SEED_LIMIT:
            raise InvalidRequestError(
                f"seed {seed} is not from 0 to {SEED_LIMIT - 1}", param="seed"
            )
        with self._running(), self._room.taken(self._left()):
            written = self._look_up(prompt)
            given = self._encoded(first_frames)
            latent = self._generator.start(self._embed(written))
            return self._state(written, written, seed, latent, given, DriftState())

    def begin(self, state: SessionState, prompts: Sequence[str] = ()) -> EngineStep:
        """Begin to generate the next chunk, a forward or the decoding a slice; see `Engine.begin`.

        Raises `EngineError` for a state in the middle of a step.
        """
        self._check_whole(state)
        self._rounding.check(state.fingerprint, state.next_index)
        state.whole = False
        what = f"chunk {state.next_index} on {self._device}"
        return EngineStep(self._slices(state, tuple(prompts)), self._slicing, what)

    def step(self, state: SessionState, prompts: Sequence[str] = ()) -> Chunk:
        """Generate the next chunk; see `Engine.step`."""
        step = self.begin(state, prompts)
        while (chunk := step.advance()) is None:
            pass
        return chunk

    def _slices(self, state: SessionState, prompts: tuple[str, ...]) -> Slices[Chunk]:
        stages, index = Stages(self._lanes, state.spans), state.next_index
        if prompts:
            yield from self._switching(state, prompts[-1], stages)
            yield
        query = state.latent.query_BMC
        latents = yield from self._next_latents(state, stages)
        # Marked in the slice that made the latents, before anybody else's can come behind them.
        clean = self._lanes.mark()
        yield
        yield from stages.each("context", self._generator.absorbing(state.latent, latents))
        yield
        frames, numbers = self._decode(state, latents, query, clean, stages)
        with stages.on_host("drift"):
            drift = self._drift(state, frames, numbers, restart=bool(prompts))
        self._rounding.check(state.fingerprint, index)
        data = frames.tobytes()
        count, height, width, _ = frames.shape
        state.whole = True
        return Chunk(
            index=index,
            frames=data,
            num_frames=count,
            height=height,
            width=width,
            digest=frames_digest(data),
            drift=drift,
            prompt=state.prompt.text,
            ignored_words=named_words(self.understood(state.prompt.text)[1]),
            stage_seconds=stages.told(),
        )

    def saving(self, state: SessionState) -> Callable[[], Snapshot]:
        """Start to save the state at a point; see `Engine.saving`.

        Raises `EngineError` elsewhere, and in the middle of a step.
        """
        self._check_whole(state)
        if not state.at_point:
            every = self._preset.cache.point_every
            raise EngineError(
                f"chunk {state.next_index} is not a point; points are multiples of {every}"
            )
        return pack(state, self.fingerprint, self._lanes)

    def save(self, state: SessionState) -> Snapshot:
        """The state at a point, as a value; refuses as `saving`."""
        return self.saving(state)()

    @staticmethod
    def _check_whole(state: SessionState) -> None:
        if not state.whole:
            raise EngineError(
                f"the state is in the middle of a step, near chunk {state.next_index}; "
                "finish the step, or load the state again"
            )

    def load(self, snapshot: Snapshot) -> SessionState:
        """Rebuild a state from its compact form. Raises `SnapshotError` if a part does not fit."""
        ours, theirs = self.fingerprint.rsplit("/", 1)[0], snapshot.fingerprint.rsplit("/", 1)[0]
        if ours != theirs:
            raise SnapshotForeign(f"snapshot is of model {theirs!r}; this engine runs {ours!r}")
        compact = unpack(snapshot, with_memory=self._modules.memory is not None)
        with self._running(), self._room.taken(self._left()):
            latent = self._latent(compact)
            given = self._given(compact)
            state = self._state(
                compact.prompt, compact.sink_prompt, compact.seed, latent, given, compact.drift
            )
            if not state.at_point:
                raise SnapshotCorrupt(f"snapshot of chunk {state.next_index} is not at a point")
            if state.next_index:
                self._generator.rebuild(latent)
                made = state.next_index * self._preset.cache.frames_per_chunk
                state.decoder = self._decoders.rebuilt(latent.history_BFCHW, made)
        return state

    def _left(self) -> list[str]:
        """Parts of a session that others have left and that wait for the next."""
        free = {"window": self._generator.arenas.free, "decoder": self._decoders.free}
        return [name for name, count in free.items() if count]

    def close(self, state: SessionState) -> None:
        """Give back what the state holds; see `Engine.close`."""
        self._generator.close(state.latent)
        self._decoders.close(state.decoder)

    def state_bytes(self, state: SessionState) -> int:
        return state_bytes(state)

    def memory(self) -> Mapping[str, int]:
        """`footprint.device_memory`; `arenas` and `decoders` are leased ones and free ones."""
        return device_memory(self._device, arenas=self._generator.arenas, decoders=self._decoders)

    def _latent(self, compact: CompactState) -> LatentState:
        """A stream at the compact state, its window still empty; geometry is checked here."""
        latent = self._generator.start(self._embed(self._checked("prompt_rows", compact.prompt)))
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
        return latent

    def _fitting(self, name: str, tensor: Tensor, expected: tuple[int, ...]) -> Tensor:
        if tuple(tensor.shape) != expected or tensor.dtype != self._generator.dtype:
            raise SnapshotCorrupt(
                f"snapshot tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"expected {self._generator.dtype} {expected}"
            )
        return tensor.to(self._device)

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
        if not first_frames:
            tail = (dit.in_channels, dit.latent_height, dit.latent_width)
            return torch.zeros(1, 0, *tail, device=self._device, dtype=self._generator.dtype)
        pixels = torch.frombuffer(bytearray(first_frames), dtype=torch.uint8)
        frames = pixels.view(1, count, shape.height, shape.width, 3).permute(0, 1, 4, 2, 3)
        scaled = frames.to(self._device, torch.float32) / 255.0
        return self._modules.codec.encode(scaled.to(self._generator.dtype))

    def _state(
        self,
        prompt: Prompt,
        sink_prompt: Prompt,
        seed: int,
        latent: LatentState,
        given: Tensor,
        drift: DriftState,
    ) -> SessionState:
        decoder = self._decoders.start()
        every = self._preset.cache.point_every
        return SessionState(
            seed, prompt, sink_prompt, given, latent, decoder, drift, every, self.fingerprint
        )

    def _next_latents(self, state: SessionState, stages: Stages) -> Slices[Tensor]:
        """The next chunk's clean latents: given ones while there are any, else denoised."""
        count = self._preset.cache.frames_per_chunk
        if state.given_BGChw.shape[1]:
            latents = state.given_BGChw[:, :count]
            state.given_BGChw = state.given_BGChw[:, count:]
            with stages.timed("context"):
                self._generator.make_room(state.latent)
            return latents
        denoising = self._generator.denoising(state.latent, self._noise(state.seed))
        return (yield from stages.each("denoise", denoising))

    def _switching(self, state: SessionState, text: str, stages: Stages) -> Slices[None]:
        # The encoder ends with a look at what it made, wherever it runs.
        with stages.on_host("text"):
            prompt = self._look_up(text)
        yield
        with stages.timed("recache"):
            self._generator.switch(state.latent, self._embed(prompt))
        state.prompt = prompt
        if state.latent.sink_prompt is state.latent.prompt:
            state.sink_prompt = prompt

    def _decode(
        self,
        state: SessionState,
        latents: Tensor,
        before: Tensor | None,
        clean: Mark,
        stages: Stages,
    ) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], list[float]]:
        """Frames as uint8 [N, H, W, 3] and latent statistics, fetched from the device together.

        `before`: the memory's query at the chunk's begin. `clean`: where the latents are ready.
        Waits for the frames, and not for a context pass that still runs beside them.
        """
        after = state.latent.query_BMC
        inputs = [tensor for tensor in (latents, before, after) if tensor is not None]
        with self._lanes.decoding(clean, inputs):
            with stages.timed("decode"):
                video = self._decoders.decode(state.decoder, latents)
                pixels = frames_to_uint8(video[0])
                numbers = latent_statistics(latents, before, after)
            copy = self._lanes.fetch([pixels, numbers])
        frames, numbers = copy.wait()
        return frames.numpy(), numbers.tolist()

    def _drift(
        self,
        state: SessionState,
        frames: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
        numbers: list[float],
        *,
        restart: bool,
    ) -> DriftReading:
        names = ("latent_mean", "latent_spread", "memory_norm", "memory_update")
        parts = frame_parts(frames) | dict(zip(names, numbers, strict=True))
        return read_drift(state.drift, parts, restart=restart)

    def _look_up(self, text: str) -> Prompt:
        if not text.strip():
            raise PromptError("prompt is empty; say what to show", param="prompt")
        return self._prompts.look_up(text)

    def _embed(self, prompt: Prompt) -> Tensor:
        return padded(prompt, self._preset.dit.text_len)

    def _noise(self, seed: int) -> SessionNoise:
        shape, frames = self._preset.dit, self._preset.cache.frames_per_chunk
        size = (1, frames, shape.in_channels, shape.latent_height, shape.latent_width)
        return SessionNoise(seed, size, self._device, self._generator.dtype)

    @contextmanager
    def _slicing(self) -> Iterator[None]:
        with self._running(), self._lanes.launch():
            yield

    @contextmanager
    def _running(self) -> Iterator[None]:
        """No gradients, and the thread count that the fingerprint names."""
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            yield
