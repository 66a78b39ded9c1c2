"""The engine that a configuration names: preset, weights, device, and whether it all fits."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial

import psutil
import torch

from echo_kernels import check_choice
from echo_ray.config import ModelSection
from echo_ray.engine.engine import EchoEngine
from echo_ray.engine.generator import ARENAS_KEPT
from echo_ray.engine.room import GIB, session_parts
from echo_ray.engine.rounding import compile_kernels
from echo_ray.engine.state import SessionState
from echo_ray.errors import ConfigError, DeviceFull, DeviceMissing, EngineError, MemoryShort
from echo_ray.model.backends import Attention, Machine, choose, choose8
from echo_ray.model.computing import Precision, use
from echo_ray.preset import CacheShape, DiTShape, Preset, UMT5Shape, load_preset, with_codec
from echo_ray.session.snapshot import Snapshot
from echo_ray.weights.folder import WeightsFolder
from echo_ray.weights.location import weights_folder
from echo_ray.weights.modules import Modules, TextPlace, load_modules
from echo_ray.weights.parts import DTYPES, build_parts

WARM_UP_PROMPT = "a red circle"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model is to compute."""

    attention: Attention
    precision: Precision

    def applied(self, modules: Modules) -> Modules:
        """The modules, made to compute so; nothing else may use them."""
        how = use(modules.dit, modules.memory, self.attention, self.precision)
        return replace(modules, computing=how)


def build_engine(config: ModelSection) -> EchoEngine:
    """Load what `config` names onto its device.

    Raises `WeightsError`, and before anything is read `ConfigError` (`DeviceMissing`,
    `DeviceTooOld`, `BackendMissing`, `MemoryShort`) and `ModelUnknown`.
    """
    _check_kernels()
    device = _device("model.device", config.device)
    text_device = _device("model.text_device", config.text_device or config.device)
    whole = load_preset(config.preset)
    preset = with_codec(whole, config.vae)
    plan = computing_of(config, preset, Machine.of(device))
    folder = WeightsFolder.open(weights_folder(config))
    folder.check(whole)
    check_room(preset, device, text_device)
    text = TextPlace(device=text_device, keep=config.keep_text_encoder)
    modules = plan.applied(load_modules(preset, folder, device, text))
    engine = EchoEngine(
        preset,
        modules,
        device,
        config.threads,
        prompts_kept=config.prompts_kept,
        text=text_device,
        graphs=config.graphs,
    )
    if device.type == "cuda":
        compile_kernels(partial(warm_up, engine, preset.cache))
        record_ahead(engine, preset.cache)
    return engine


def warm_up(engine: EchoEngine, cache: CacheShape) -> None:
    """A stream that has every phase of one, and comes back."""
    state = engine.open(WARM_UP_PROMPT, 0)
    try:
        saved = _all_phases(engine, state, cache)
    finally:
        engine.close(state)
    engine.close(engine.load(saved))


def record_ahead(engine: EchoEngine, cache: CacheShape, sessions: int = ARENAS_KEPT) -> None:
    """So many streams at once, as far as there is memory: arenas and places with their recordings.

    A recording waits for the whole device. Made when a second session comes, it would be the first
    one's viewers that wait.
    """
    states: list[SessionState] = []
    try:
        for _ in range(sessions):
            states.append(engine.open(WARM_UP_PROMPT, 0))
            _all_phases(engine, states[-1], cache)
    except (DeviceFull, EngineError) as e:
        _log.warning("recorded ahead for %d of %d sessions: %s", len(states), sessions, e)
    finally:
        for state in states:
            engine.close(state)


def _all_phases(engine: EchoEngine, state: SessionState, cache: CacheShape) -> Snapshot:
    """The window fills, the memory comes and is seen from the first forward on, a point, a switch
    just before the next point; the last of the points."""
    saved = engine.save(state)
    chunks = max(cache.window_frames // cache.frames_per_chunk + 2, cache.point_every)
    before_point = -(chunks + 1) % cache.point_every if cache.point_every else 0
    for _ in range(chunks + before_point):
        engine.step(state)
        if state.at_point:
            saved = engine.save(state)
    engine.step(state, [WARM_UP_PROMPT])
    return engine.save(state) if state.at_point else saved


def computing_of(config: ModelSection, preset: Preset, machine: Machine) -> Plan:
    """How a configuration's model is to compute on a machine.

    Raises `DeviceMissing`, `DeviceTooOld`, `BackendMissing`, and `ConfigError` for a model that it
    cannot be.
    """
    precision, dtype, dit = Precision(config.precision), DTYPES[preset.dtype], preset.dit
    if precision is not Precision.EXACT and machine.kind == "cuda":
        _check_8_bits(precision, machine, dtype, dit)
    take = choose8 if precision is Precision.FP8_ATTENTION8 else choose
    return Plan(take(config.attention, machine, dtype, dit.head_dim), precision)


def _check_8_bits(
    precision: Precision, machine: Machine, dtype: torch.dtype, dit: DiTShape
) -> None:
    """What PyTorch's product of rows in 8 bits asks of a device and of a model."""
    key = "model.precision"
    machine.require(key, str(precision), (9, 0), "take exact")
    if dtype is not torch.bfloat16 or dit.dim % 16 or dit.ffn_dim % 16:
        raise ConfigError(
            f"{key}: {precision} on CUDA takes bfloat16 and widths that are multiples of 16, this "
            f"model has {str(dtype).removeprefix('torch.')}, dit.dim {dit.dim} and dit.ffn_dim "
            f"{dit.ffn_dim}; take exact",
            param=key,
        )


def _check_kernels() -> None:
    try:
        check_choice()
    except ValueError as e:
        raise ConfigError(str(e)) from e


def _device(key: str, name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceMissing(
            f"{key}: cuda is not available on this machine: PyTorch {torch.__version__} sees "
            "0 CUDA devices and needs 1; use cpu, or a machine and a build of PyTorch with CUDA",
            param=key,
        )
    return torch.device(name)


def needed_bytes(preset: Preset, *, with_text: bool) -> int:
    """What the weights take in memory, and one session as it is counted at admission."""
    with torch.device("meta"):
        parts = build_parts(preset)
    numbers = sum(
        p.numel()
        for name, module in parts.items()
        for p in module.parameters()
        if with_text or name != "text"
    )
    return numbers * DTYPES[preset.dtype].itemsize + sum(session_parts(preset).values())


def check_room(preset: Preset, device: torch.device, text_device: torch.device) -> None:
    """Raise `MemoryShort` unless the model and one session fit into what is free on the device.

    On a CPU umT5 does not count: it stays mapped from its file.
    """
    mapped = isinstance(preset.text, UMT5Shape) and text_device.type == "cpu"
    needed = needed_bytes(preset, with_text=text_device == device and not mapped)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    if needed > free:
        raise MemoryShort(
            f"preset {preset.name} needs {needed / GIB:.1f} GiB on {device} for weights and one "
            f"session, {free / GIB:.1f} GiB are free; free some, use a larger device, or set "
            "model.text_device: cpu"
        )
