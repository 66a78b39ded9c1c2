"""One device, many sessions, four verbs: open, step, save, load.

The engine knows nothing about networks, leases or viewers. A step is a pure function of the state,
the prompts pinned to it and the seed's noise, so whoever repeats it gets the same bits.

Shapes: B batch (1 here), F latent frames, C H W latent, N pixel frames.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor

from echo_ray.config import ModelSection
from echo_ray.engine.drift import DriftState, frame_parts, read_drift
from echo_ray.engine.generator import Generator, LatentState
from echo_ray.engine.noise import SEED_LIMIT, gaussian
from echo_ray.engine.state import CompactState, SessionState, pack, unpack
from echo_ray.engine.weights import FILE, Modules, load_modules
from echo_ray.errors import (
    ConfigError,
    EngineError,
    InvalidRequestError,
    PromptError,
    SnapshotCorrupt,
    SnapshotForeign,
)
from echo_ray.preset import Preset, load_preset, preset_folder
from echo_ray.session.chunk import Chunk, DriftReading, frames_digest
from echo_ray.session.engine_port import StreamShape, stream_shape
from echo_ray.session.snapshot import Snapshot

CODE_EPOCH = 1
"""Raised whenever a change of code changes bits."""


@dataclass(slots=True)
class Stages:
    """Wall seconds of one step, by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class EchoEngine:
    """Implements `echo_ray.session.engine_port.Engine` on one torch device."""

    def __init__(
        self, preset: Preset, modules: Modules, device: torch.device, threads: int
    ) -> None:
        self._preset = preset
        self._modules = modules
        self._device = device
        self._threads = threads
        self._shape = stream_shape(preset)
        self._generator = Generator(modules.dit, modules.memory, preset.cache, preset.sampler)
        self._fingerprint = f"{_model_identity(preset, modules)}/{_numerics(device, threads)}"

    @property
    def shape(self) -> StreamShape:
        return self._shape

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def understood(self, prompt: str) -> tuple[list[str], list[str]]:
        """The prompt's words that the model knows, and those it ignores."""
        return self._modules.text.understood(prompt)

    def open(self, prompt: str, seed: int) -> SessionState:
        """Point 0 of a new session. Raises `PromptError` or `InvalidRequestError`."""
        if not prompt.strip():
            raise PromptError("prompt is empty; say what to show", param="prompt")
        if not 0 <= seed < SEED_LIMIT:
            raise InvalidRequestError(
                f"seed {seed} is not from 0 to {SEED_LIMIT - 1}", param="seed"
            )
        with self._running():
            latent = self._generator.start(self._embed(prompt))
        return self._state(prompt, prompt, seed, latent, DriftState())

    def step(self, state: SessionState, prompts: Sequence[str] = ()) -> Chunk:
        """Generate the next chunk; see `Engine.step`."""
        stages = Stages()
        index = state.next_index
        try:
            with self._running():
                if prompts:
                    self._switch(state, prompts[-1], stages)
                query = state.latent.query_BMC
                with stages.timed("denoise"):
                    latents = self._generator.denoise(state.latent, self._noise(state.seed))
                with stages.timed("context"):
                    self._generator.absorb(state.latent, latents)
                with stages.timed("decode"):
                    frames, numbers = self._decode(state, latents, query)
                with stages.timed("drift"):
                    drift = self._drift(state, frames, numbers, restart=bool(prompts))
        except RuntimeError as e:
            raise EngineError(f"chunk {index} failed on {self._device}: {e}") from e
        data = frames.tobytes()
        count, height, width, _ = frames.shape
        return Chunk(
            index=index,
            frames=data,
            num_frames=count,
            height=height,
            width=width,
            digest=frames_digest(data),
            drift=drift,
            prompt=state.prompt,
            stage_seconds=stages.seconds,
        )

    def save(self, state: SessionState) -> Snapshot:
        """The state at a point, as a value. Raises `EngineError` elsewhere."""
        if not state.at_point:
            every = self._preset.cache.point_every
            raise EngineError(
                f"chunk {state.next_index} is not a point; points are multiples of {every}"
            )
        return pack(state, self._fingerprint)

    def load(self, snapshot: Snapshot) -> SessionState:
        """Rebuild a state from its compact form. Raises `SnapshotError` if a part does not fit."""
        ours, theirs = self._fingerprint.rsplit("/", 1)[0], snapshot.fingerprint.rsplit("/", 1)[0]
        if ours != theirs:
            raise SnapshotForeign(f"snapshot is of model {theirs!r}; this engine runs {ours!r}")
        compact = unpack(snapshot, with_memory=self._modules.memory is not None)
        with self._running():
            latent = self._latent(compact)
            state = self._state(
                compact.prompt, compact.sink_prompt, compact.seed, latent, compact.drift
            )
            if not state.at_point:
                raise SnapshotCorrupt(f"snapshot of chunk {state.next_index} is not at a point")
            if state.next_index:
                self._generator.rebuild(latent)
                state.decoder = self._rebuilt_decoder(latent)
        return state

    def _latent(self, compact: CompactState) -> LatentState:
        """A stream at the compact state, its window still empty; geometry is checked here."""
        latent = self._generator.start(self._embed(compact.prompt))
        latent.sink_prompt = latent.prompt
        if compact.sink_prompt != compact.prompt:
            text = self._embed(compact.sink_prompt)
            latent.sink_prompt = self._modules.dit.encode_prompt(text)
        shape, cache = self._preset.dit, self._preset.cache
        done = compact.next_chunk * cache.frames_per_chunk
        tail = (shape.in_channels, shape.latent_height, shape.latent_width)
        latent.sink_BFCHW = self._fitting(
            "sink", compact.sink, (1, min(done, cache.sink_frames), *tail)
        )
        latent.history_BFCHW = self._fitting(
            "history", compact.history, (1, min(done, cache.history_frames), *tail)
        )
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

    def _state(
        self, prompt: str, sink_prompt: str, seed: int, latent: LatentState, drift: DriftState
    ) -> SessionState:
        decoder = self._modules.codec.initial_state()
        every = self._preset.cache.point_every
        return SessionState(seed, prompt, sink_prompt, latent, decoder, drift, every)

    def _switch(self, state: SessionState, prompt: str, stages: Stages) -> None:
        if not prompt.strip():
            raise PromptError("prompt is empty; say what to show", param="prompt")
        with stages.timed("text"):
            text = self._embed(prompt)
        with stages.timed("recache"):
            self._generator.switch(state.latent, text)
        state.prompt = prompt
        if state.latent.sink_prompt is state.latent.prompt:
            state.sink_prompt = prompt

    def _decode(
        self, state: SessionState, latents: Tensor, query: Tensor | None
    ) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], list[float]]:
        """Frames as uint8 [N, H, W, 3] and latent statistics, fetched from the device together."""
        video, state.decoder = self._modules.codec.decode(latents, state.decoder)
        if state.at_point:
            state.decoder = self._rebuilt_decoder(state.latent)
        pixels = (video[0].permute(0, 2, 3, 1) * 255.0).round().to(torch.uint8).contiguous()
        stats = _latent_statistics(latents, query, state.latent.query_BMC)
        return pixels.to("cpu").numpy(), stats.to("cpu").tolist()

    def _rebuilt_decoder(self, latent: LatentState) -> dict[str, Tensor]:
        whole = latent.history_BFCHW.shape[1]
        first = latent.next_chunk * self._preset.cache.frames_per_chunk == whole
        return self._modules.codec.rebuild(latent.history_BFCHW, first)

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

    def _embed(self, prompt: str) -> Tensor:
        return self._modules.text.encode(prompt)

    def _noise(self, seed: int) -> _Noise:
        shape, frames = self._preset.dit, self._preset.cache.frames_per_chunk
        size = (1, frames, shape.in_channels, shape.latent_height, shape.latent_width)
        return _Noise(seed, size, self._device, self._generator.dtype)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """No gradients, and the thread count that the fingerprint names."""
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            yield


@dataclass(frozen=True, slots=True)
class _Noise:
    """A session's noise on its device: called with (chunk, step)."""

    seed: int
    size: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    def __call__(self, chunk: int, step: int) -> Tensor:
        return gaussian(self.seed, chunk, step, self.size).to(self.device, self.dtype)


def _latent_statistics(latents: Tensor, before: Tensor | None, after: Tensor | None) -> Tensor:
    """[mean size per channel, spread per channel, memory norm, relative memory update]."""
    wide = latents.float()
    mean = wide.mean(dim=(0, 1, 3, 4)).abs().mean()
    spread = wide.std(dim=(0, 1, 3, 4)).mean()
    zero = torch.zeros_like(mean)
    if before is None or after is None:
        return torch.stack([mean, spread, zero, zero])
    norm = after.float().pow(2).mean().sqrt()
    update = (after.float() - before.float()).pow(2).mean().sqrt() / norm.clamp_min(1e-6)
    return torch.stack([mean, spread, norm, update])


def _model_identity(preset: Preset, modules: Modules) -> str:
    """Name and hash of everything that decides what is computed, but for the device."""
    text = f"{asdict(preset)}|{modules.digest}|{CODE_EPOCH}"
    return f"{preset.name}/{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _numerics(device: torch.device, threads: int) -> str:
    """Hash of everything that decides how it is rounded."""
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    else:
        kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {threads}"
    text = f"{device.type}|{kind}|{torch.__version__}|{np.__version__}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def build_engine(config: ModelSection) -> EchoEngine:
    """The engine that a configuration names: preset, weights, device."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device: cuda is not available on this machine; use cpu")
    device = torch.device(config.device)
    preset = load_preset(config.preset)
    modules = load_modules(preset, preset_folder(config.preset) / FILE, device)
    return EchoEngine(preset, modules, device, config.threads)
