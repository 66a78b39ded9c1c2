"""What a model is, as data: geometry, cache, sampler, text and codec of a preset.

A preset is a folder with `preset.toml` and its weights. Sizes that follow from others are
properties here and literals nowhere.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from echo_ray.config import from_mapping, require
from echo_ray.errors import ConfigError, ModelUnknown

DTYPES = ("float32", "bfloat16")
PRESETS = Path(str(resources.files("echo_ray") / "presets"))


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTShape:
    """Dimensions of the causal diffusion transformer (spec section 3)."""

    dim: int
    num_heads: int
    ffn_dim: int
    num_layers: int
    latent_height: int
    latent_width: int
    text_dim: int
    text_len: int
    freq_dim: int = 256
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    qk_norm: bool = True
    cross_attn_norm: bool = True

    def __post_init__(self) -> None:
        require(
            self.dim % self.num_heads == 0, "dit.num_heads", self.num_heads, f"divide {self.dim}"
        )
        require(self.head_dim % 2 == 0, "dit.num_heads", self.num_heads, "leave an even head size")
        require(self.freq_dim % 2 == 0, "dit.freq_dim", self.freq_dim, "even")
        require(self.patch_size[0] == 1, "dit.patch_size", self.patch_size, "1 in time")
        fits = self.latent_height % self.patch_size[1] == 0
        require(fits, "dit.latent_height", self.latent_height, "a multiple of the patch")
        fits = self.latent_width % self.patch_size[2] == 0
        require(fits, "dit.latent_width", self.latent_width, "a multiple of the patch")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def grid_height(self) -> int:
        return self.latent_height // self.patch_size[1]

    @property
    def grid_width(self) -> int:
        return self.latent_width // self.patch_size[2]

    @property
    def tokens_per_frame(self) -> int:
        return self.grid_height * self.grid_width


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryShape:
    """The learned memory (spec section 6): Q frame equivalents of tokens."""

    frames: int = 3
    encoder_layers: int = 2
    ffn_dim: int | None = None
    """None: four times the transformer's width, as published."""
    normalize_keys: bool = False
    tokens: int | None = None
    """How many the trained encoder has; None: as many as the latent grid asks for."""
    recache: bool = True
    """Whether a prompt switch rebuilds the memory from the recached window."""
    gate: bool = True
    """False: each update's candidate is the new state, an ablation of the paper."""

    def __post_init__(self) -> None:
        require(self.frames >= 1, "cache.memory.frames", self.frames, "at least 1")
        require(
            self.encoder_layers >= 1,
            "cache.memory.encoder_layers",
            self.encoder_layers,
            "at least 1",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheShape:
    """The three tiers and their cache policy (spec sections 4, 5 and 8)."""

    policy: str = "echo"
    frames_per_chunk: int = 3
    window_frames: int = 12
    """Sink included."""
    sink_frames: int = 3
    position_limit: int = 21
    memory: MemoryShape | None = None
    global_sink: bool = True
    point_every: int = 8
    """K: the state is consolidated at chunk indices divisible by this. 0: never."""

    def __post_init__(self) -> None:
        require(
            self.frames_per_chunk >= 1,
            "cache.frames_per_chunk",
            self.frames_per_chunk,
            "at least 1",
        )
        require(
            1 <= self.sink_frames <= self.frames_per_chunk,
            "cache.sink_frames",
            self.sink_frames,
            f"1 to cache.frames_per_chunk ({self.frames_per_chunk}): a wider sink keeps noisy keys",
        )
        require(
            self.local_frames >= self.frames_per_chunk,
            "cache.window_frames",
            self.window_frames,
            f"at least sink + chunk = {self.sink_frames + self.frames_per_chunk}",
        )
        require(self.point_every >= 0, "cache.point_every", self.point_every, "0 or more")

    @property
    def local_frames(self) -> int:
        return self.window_frames - self.sink_frames

    @property
    def memory_frames(self) -> int:
        return self.memory.frames if self.memory else 0

    @property
    def history_frames(self) -> int:
        """Latest clean latents that a switch or a rebuild can ask for, besides the sink's."""
        return self.local_frames if self.global_sink else self.window_frames


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerShape:
    """The few-step flow-matching sampler (spec section 7)."""

    steps: tuple[int, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    kind: str = "renoise"
    """renoise: fresh noise after each step, as published. euler: the predicted noise again."""
    context_noise: float = 0.0

    def __post_init__(self) -> None:
        require(len(self.steps) >= 1, "sampler.steps", self.steps, "at least one step")
        falling = all(a > b for a, b in zip(self.steps, self.steps[1:], strict=False))
        inside = all(0 < s <= 1000 for s in self.steps)
        require(falling and inside, "sampler.steps", self.steps, "falling, each from 1 to 1000")
        require(self.shift > 0, "sampler.shift", self.shift, "more than 0")
        require(self.kind in ("renoise", "euler"), "sampler.kind", self.kind, "renoise or euler")


@dataclass(frozen=True, kw_only=True, slots=True)
class WordTextShape:
    """The word-level prompt encoder of the tiny preset."""

    kind: str = "words"
    layers: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        require(self.kind == "words", "text.kind", self.kind, "words")


@dataclass(frozen=True, kw_only=True, slots=True)
class UMT5Shape:
    """The umT5 encoder (spec section 10); its width is the transformer's `text_dim`."""

    kind: str = "umt5"
    vocab: int = 256_384
    dim_attn: int = 4096
    dim_ffn: int = 10_240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    def __post_init__(self) -> None:
        require(self.kind == "umt5", "text.kind", self.kind, "umt5")
        fits = self.dim_attn % self.num_heads == 0
        require(fits, "text.num_heads", self.num_heads, f"divide {self.dim_attn}")
        even = self.num_buckets >= 4 and self.num_buckets % 4 == 0
        require(even, "text.num_buckets", self.num_buckets, "a multiple of 4")
        far = self.max_distance > self.num_buckets // 4
        require(far, "text.max_distance", self.max_distance, "beyond the exact buckets")


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupCodecShape:
    """Latents to frames and back: a group of frames as channels of one image."""

    kind: str = "group"
    widths: tuple[int, int] = (64, 112)
    blocks: int = 3
    spatial_stride: int = 8
    temporal_stride: int = 4

    def __post_init__(self) -> None:
        require(self.kind == "group", "codec.kind", self.kind, "group")


@dataclass(frozen=True, kw_only=True, slots=True)
class WanVaeShape:
    """The causal Wan2.1 VAE (spec section 9); latents are normalised by `mean` and `std`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    kind: str = "wan"
    dim: int = 96
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)

    def __post_init__(self) -> None:
        require(self.kind == "wan", "codec.kind", self.kind, "wan")
        flags = len(self.temporal_downsample) == len(self.dim_mult) - 1
        rule = "one flag for each level but the last"
        require(flags, "codec.temporal_downsample", self.temporal_downsample, rule)
        require(len(self.mean) == len(self.std), "codec.std", self.std, "as long as codec.mean")
        require(all(s > 0 for s in self.std), "codec.std", self.std, "positive")

    @property
    def spatial_stride(self) -> int:
        return int(2 ** (len(self.dim_mult) - 1))

    @property
    def temporal_stride(self) -> int:
        return int(2 ** sum(self.temporal_downsample))


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyVaeShape:
    """The TAEHV-class small autoencoder for Wan latents."""

    kind: str = "tiny"
    encoder_width: int = 64
    decoder_widths: tuple[int, int, int, int] = (256, 128, 64, 64)

    def __post_init__(self) -> None:
        require(self.kind == "tiny", "codec.kind", self.kind, "tiny")

    @property
    def spatial_stride(self) -> int:
        return 8

    @property
    def temporal_stride(self) -> int:
        return 4


TextShape = WordTextShape | UMT5Shape
CodecShape = GroupCodecShape | WanVaeShape | TinyVaeShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One model that can be served."""

    name: str
    fps: int
    dit: DiTShape
    cache: CacheShape
    sampler: SamplerShape
    text: TextShape
    codec: CodecShape
    small_codec: TinyVaeShape | None = None
    """A quicker codec for the same latents, chosen by `model.vae: tiny`."""
    dtype: str = "float32"
    """In which weights, state and arithmetic are held."""

    def __post_init__(self) -> None:
        c = self.cache
        require(
            c.sink_frames == c.frames_per_chunk and c.local_frames % c.frames_per_chunk == 0,
            "cache.sink_frames",
            c.sink_frames,
            "a served preset has a sink of one chunk and a window of whole chunks",
        )
        require(1 <= self.fps <= 240, "fps", self.fps, "1 to 240")
        require(self.dtype in DTYPES, "dtype", self.dtype, " or ".join(DTYPES))
        if isinstance(self.codec, WanVaeShape):
            channels = self.dit.in_channels
            fits = len(self.codec.mean) == channels
            require(fits, "codec.mean", self.codec.mean, f"{channels} values, one a channel")
        if c.memory is not None and c.memory.tokens is not None:
            check_memory_tokens(self.dit, c.memory, c.memory.tokens)

    @property
    def width(self) -> int:
        return self.dit.latent_width * self.codec.spatial_stride

    @property
    def height(self) -> int:
        return self.dit.latent_height * self.codec.spatial_stride

    @property
    def frames_per_chunk(self) -> int:
        """Pixel frames of every chunk but the first."""
        return self.cache.frames_per_chunk * self.codec.temporal_stride

    @property
    def first_chunk_frames(self) -> int:
        """Pixel frames of chunk 0: its first latent decodes to a single frame."""
        return 1 + (self.cache.frames_per_chunk - 1) * self.codec.temporal_stride


def check_memory_tokens(dit: DiTShape, memory: MemoryShape, tokens: int) -> None:
    """Raise `ConfigError` unless a memory encoder of so many tokens fits the latent grid."""
    grid = f"{dit.latent_height} x {dit.latent_width} latents make {dit.tokens_per_frame}"
    require(
        tokens == memory.frames * dit.tokens_per_frame,
        "cache.memory.tokens",
        tokens,
        f"the memory holds {memory.frames} frames of {tokens / memory.frames:g} tokens, and {grid} "
        "tokens a frame; the resolution is fixed by the trained memory encoder: keep the preset's "
        "dit.latent_height and dit.latent_width, or bring an encoder trained for another grid",
    )


def preset_folder(name: str) -> Path:
    """Folder of a preset: a packaged one by its name, or any folder that holds a `preset.toml`.

    Raises `ModelUnknown`, naming those that exist.
    """
    known = sorted(p.parent.name for p in PRESETS.glob("*/preset.toml"))
    if name in known:
        return PRESETS / name
    if (Path(name) / "preset.toml").is_file():
        return Path(name)
    raise ModelUnknown(
        f"model {name!r} is unknown; known: {', '.join(known)}, or a folder with a preset.toml",
        param="model",
    )


def load_preset(name: str) -> Preset:
    """Read and check a preset's `preset.toml`."""
    return read_preset(preset_folder(name) / "preset.toml")


def with_codec(preset: Preset, vae: str | None) -> Preset:
    """The preset with the one codec that `model.vae` names; None means the preset's own.

    Raises `ConfigError` if the preset has no such codec.
    """
    codecs = {preset.codec.kind: preset.codec}
    if preset.small_codec is not None:
        codecs[preset.small_codec.kind] = preset.small_codec
    require(
        vae is None or vae in codecs,
        "model.vae",
        vae,
        f"preset {preset.name} has {' or '.join(codecs)}",
    )
    return replace(preset, codec=codecs[vae or preset.codec.kind], small_codec=None)


def read_preset(file: Path) -> Preset:
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{file}: cannot be read as a preset: {e}") from e
    return from_mapping(Preset, data)
