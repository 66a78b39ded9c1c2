"""The engine that a configuration names: preset, weights, device, and whether it all fits."""

from __future__ import annotations

from dataclasses import replace

import psutil
import torch

from echo_kernels import check_choice
from echo_ray.config import ModelSection
from echo_ray.engine.engine import EchoEngine
from echo_ray.errors import ConfigError, DeviceMissing, MemoryShort
from echo_ray.model.backends import Attention, Machine, choose
from echo_ray.model.codec import Codec
from echo_ray.model.computing import use
from echo_ray.preset import Preset, UMT5Shape, load_preset, with_codec
from echo_ray.weights.folder import WeightsFolder
from echo_ray.weights.location import weights_folder
from echo_ray.weights.modules import Modules, TextPlace, load_modules
from echo_ray.weights.parts import DTYPES, build_parts, codec_part

GIB = 2**30


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
    attention = attention_of(config, preset, device)
    folder = WeightsFolder.open(weights_folder(config))
    folder.check(whole)
    check_room(preset, device, text_device)
    text = TextPlace(device=text_device, keep=config.keep_text_encoder)
    modules = computing(load_modules(preset, folder, device, text), attention)
    return EchoEngine(
        preset, modules, device, config.threads, prompts_kept=config.prompts_kept, text=text_device
    )


def attention_of(config: ModelSection, preset: Preset, device: torch.device) -> Attention:
    """See `echo_ray.model.backends.choose`."""
    machine, dtype = Machine.of(device), DTYPES[preset.dtype]
    return choose(config.attention, machine, dtype, preset.dit.head_dim)


def computing(modules: Modules, attention: Attention) -> Modules:
    """The modules, made to compute so; nothing else may use them."""
    return replace(modules, computing=use(modules.dit, modules.memory, attention))


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
    """What the weights take in memory, and one session's window and decoder state."""
    with torch.device("meta"):
        parts = build_parts(preset)
    numbers = sum(
        p.numel()
        for name, module in parts.items()
        for p in module.parameters()
        if with_text or name != "text"
    )
    codec = parts[codec_part(preset.codec)]
    if isinstance(codec, Codec):
        numbers += _decoder_numbers(codec, preset)
    return (numbers + _window_numbers(preset)) * DTYPES[preset.dtype].itemsize


def _window_numbers(preset: Preset) -> int:
    """Un-rotated keys, and rotated keys and values beside those of the memory."""
    dit, cache = preset.dit, preset.cache
    frames = 3 * cache.window_frames + 2 * cache.memory_frames
    return dit.num_layers * frames * dit.tokens_per_frame * dit.dim


def _decoder_numbers(codec: Codec, preset: Preset) -> int:
    """What the decoder keeps from the second latent on; nothing is computed for it."""
    dit = preset.dit
    size = (1, 2, dit.in_channels, dit.latent_height, dit.latent_width)
    _, state = codec.decode(torch.zeros(size, device="meta"), codec.initial_state())
    return sum(tensor.numel() for tensor in state.values())


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
