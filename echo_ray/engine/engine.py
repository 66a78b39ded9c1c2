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
from echo_ray.engine.drift import frame_parts, latent_statistics, read_drift
from echo_ray.engine.fingerprint import model_identity, numerics_of
from echo_ray.engine.footprint import device_memory, state_bytes
from echo_ray.engine.generator import Generator
from echo_ray.engine.graphs import CudaRecorder
from echo_ray.engine.lanes import Mark, lanes_of
from echo_ray.engine.loading import Arrivals
from echo_ray.engine.noise import SessionNoise
from echo_ray.engine.prompts import PromptBook, padded
from echo_ray.engine.room import Room, room_of
from echo_ray.engine.rounding import Rounding
from echo_ray.engine.slices import Slices
from echo_ray.engine.state import Prompt, SessionState, pack
from echo_ray.engine.step import EngineStep, InSlices, Stages
from echo_ray.errors import EngineError, PromptError
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
        # Decodings have a recorder of their own: they run beside forwards, and recordings of one
        # share memory.
        records = graphs and device.type == "cuda"
        self._recorders = [CudaRecorder(), CudaRecorder()] if records else []
        forwards, decodings = self._recorders or (None, None)
        self._generator = Generator(
            modules.dit,
            modules.memory,
            preset.cache,
            preset.sampler,
            modules.codec.rebuild_latents,
            recorder=forwards,
            aside=aside_of(device),
        )
        self._decoders = Decoders(modules.codec, self._lanes, decodings)
        self._prompts = PromptBook(modules.text, prompts_kept)
        identity, how = model_identity(preset, modules), (device, text or device, threads)
        self._rounding = Rounding(
            lambda failed: f"{identity}/{numerics_of(*how, modules.computing, failed)}"
        )
        self._arrivals = Arrivals(
            preset,
            modules,
            self._generator,
            self._decoders,
            room=room or room_of(preset, device),
            look_up=self._look_up,
            fingerprint=lambda: self._rounding.fingerprint,
            shape=self._shape,
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
        unrecorded = sum(recorder.failures for recorder in self._recorders)
        return {**fallbacks(), **({"cuda_graph": unrecorded} if unrecorded else {})}

    def understood(self, prompt: str) -> tuple[list[str], list[str]]:
        """The prompt's words that the model knows, and those it ignores."""
        return self._modules.text.understood(prompt)

    def begin_open(
        self, prompt: str, seed: int, first_frames: bytes = b""
    ) -> InSlices[SessionState]:
        """Begin to open; see `Engine.begin_open`."""
        opening = self._arrivals.opening(prompt, seed, first_frames)
        return InSlices(opening, self._slicing, f"opening a session on {self._device}")

    def open(self, prompt: str, seed: int, first_frames: bytes = b"") -> SessionState:
        """Point 0 of a new session; see `Engine.open`."""
        return self.begin_open(prompt, seed, first_frames).finish()

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
        return self.begin(state, prompts).finish()

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

    def begin_load(self, snapshot: Snapshot) -> InSlices[SessionState]:
        """Begin to rebuild a state from its compact form; see `Engine.begin_load`."""
        what = f"loading a session on {self._device}"
        return InSlices(self._arrivals.loading(snapshot), self._slicing, what)

    def load(self, snapshot: Snapshot) -> SessionState:
        """Rebuild a state from its compact form. Raises `SnapshotError` if a part does not fit."""
        return self.begin_load(snapshot).finish()

    def close(self, state: SessionState) -> None:
        """Give back what the state holds; see `Engine.close`."""
        self._arrivals.close(state)

    def state_bytes(self, state: SessionState) -> int:
        return state_bytes(state)

    def memory(self) -> Mapping[str, int]:
        """`footprint.device_memory`; `arenas` and `decoders` are leased ones and free ones."""
        return device_memory(self._device, arenas=self._generator.arenas, decoders=self._decoders)

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
        """No gradients, and the thread count that the fingerprint names."""
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        with torch.inference_mode(), self._lanes.launch():
            yield
