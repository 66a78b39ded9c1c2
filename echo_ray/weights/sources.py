"""Finds the published files below one folder, and refuses to guess between two of a kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from echo_ray.errors import WeightsError
from echo_ray.model.tokens import FILE_NAME as TOKENIZER_FILE
from echo_ray.preset import Preset
from echo_ray.weights.wording import listed

GENERATOR_FILE = "echo_infinity.pt"
VAE_FILE = "Wan2.1_VAE.pth"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
SMALL_CODEC_FILE = "taew2_1.pth"
TOKENIZER_FOLDER = "umt5-xxl"
MERGED = "no adapter given: taken as merged"
_CHECKPOINTS = (".pt", ".pth", ".safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a user says about the files; None: look for it."""

    generator: Path | None = None
    lora: Path | None = None
    memory: Path | None = None
    vae: Path | None = None
    text: Path | None = None
    small_codec: Path | None = None
    tokenizer: Path | None = None
    ema: bool = False
    """Take the generator's averaged weights if the file has them."""
    lora_alpha: float | None = None
    """None: equal to the adapter's rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """The files of one model."""

    generator: Path
    lora: Path | None
    memory: Path | None
    vae: Path
    text: Path
    small_codec: Path | None
    tokenizer: Path
    """A folder."""
    taken_as_merged: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Role:
    """One kind of file: how it is called, and the option that names it."""

    what: str
    called: str
    option: str
    matches: Callable[[Path], bool]


def _exactly(file: str) -> Callable[[Path], bool]:
    names = {file, f"{Path(file).stem}.safetensors"}
    return lambda path: path.name in names


_GENERATOR = _Role("generator", GENERATOR_FILE, "--generator", _exactly(GENERATOR_FILE))
_VAE = _Role("VAE", VAE_FILE, "--vae", _exactly(VAE_FILE))
_TEXT = _Role("text encoder", TEXT_FILE, "--text", _exactly(TEXT_FILE))
_SMALL = _Role("small codec", SMALL_CODEC_FILE, "--small-codec", _exactly(SMALL_CODEC_FILE))
_LORA = _Role(
    "LoRA",
    "*lora*.pt",
    "--lora",
    lambda path: "lora" in path.name.lower() and path.suffix in _CHECKPOINTS,
)
_TOKENIZER = _Role(
    "tokenizer",
    f"google/{TOKENIZER_FOLDER}/{TOKENIZER_FILE}",
    "--tokenizer",
    lambda path: path.name == TOKENIZER_FILE and path.parent.name == TOKENIZER_FOLDER,
)


def is_long(preset: Preset) -> bool:
    """Whether the preset is the second training stage's, published as an adapter on the first."""
    return preset.cache.policy == "echo"


def find_sources(src: Path, preset: Preset, options: Options) -> Sources:
    """Look below `src` for what the options do not name.

    Raises `WeightsError` listing everything that is not there, or there twice.
    """
    if not src.is_dir():
        raise WeightsError(f"{src}: is not a folder; name the one with the published files")
    files = sorted(path for path in src.rglob("*") if path.is_file())
    problems: list[str] = []
    notes: list[str] = []
    generator = _required(_GENERATOR, options.generator, files, problems)
    vae = _required(_VAE, options.vae, files, problems)
    text = _required(_TEXT, options.text, files, problems)
    tokenizer = options.tokenizer or _required(_TOKENIZER, None, files, problems)
    if tokenizer is not None and tokenizer.name == TOKENIZER_FILE:
        tokenizer = tokenizer.parent
    lora = _lora(preset, options.lora, files, problems, notes)
    small = None
    if preset.small_codec is not None:
        small = options.small_codec or _one(_SMALL, files, problems)
        if small is None:
            notes.append(f"no {SMALL_CODEC_FILE}: the folder goes without small_codec")
    if problems or generator is None or vae is None or text is None or tokenizer is None:
        raise WeightsError(f"{src}: {'; '.join(problems)}")
    return Sources(
        generator=generator,
        lora=lora,
        memory=options.memory,
        vae=vae,
        text=text,
        small_codec=small,
        tokenizer=tokenizer,
        taken_as_merged=lora is None and is_long(preset),
        notes=notes,
    )


def _required(
    role: _Role, given: Path | None, files: list[Path], problems: list[str]
) -> Path | None:
    known = len(problems)
    path = given or _one(role, files, problems)
    if path is None and len(problems) == known:
        problems.append(f"no {role.what}: {role.called} is not there (name it with {role.option})")
    return path


def _one(role: _Role, files: list[Path], problems: list[str]) -> Path | None:
    """The only file of a kind; several names of one file count once."""
    found = {path.resolve(): path for path in reversed(files) if role.matches(path)}
    if len(found) > 1:
        names = listed(sorted(str(path) for path in found.values()))
        problems.append(f"{len(found)} files for the {role.what}: {names} (choose: {role.option})")
        return None
    return next(iter(found.values()), None)


def _lora(
    preset: Preset, given: Path | None, files: list[Path], problems: list[str], notes: list[str]
) -> Path | None:
    if given is not None:
        return given
    if not is_long(preset):
        unused = [path.name for path in files if _LORA.matches(path)]
        if unused:
            notes.append(f"{listed(unused)}: not used, as {preset.name} is the base model alone")
        return None
    known = len(problems)
    path = _one(_LORA, files, problems)
    if path is None and len(problems) == known:
        notes.append(f"{MERGED}; if it is not, name the adapter with --lora")
    return path
