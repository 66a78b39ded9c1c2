"""`echo-ray play "PROMPT"`: generate a clip with the engine alone, no Ray, no network."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from echo_ray.commands.settings import add_settings

if TYPE_CHECKING:
    from echo_ray.config import LimitsSection
    from echo_ray.engine.engine import EchoEngine
    from echo_ray.session.chunk import Chunk

HELP = "generate a clip with the engine alone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help='what to show, e.g. "a red ball on a blue background"')
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the clip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("clip.mp4"), help="mp4 file to write")
    parser.add_argument(
        "--switch",
        action="append",
        default=[],
        metavar="SECOND=PROMPT",
        help="change the prompt at this second of the clip; may be given several times",
    )
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet (png)")
    parser.add_argument("--clip", type=Path, help="an mp4, png or jpeg to begin with and to go on")
    add_settings(parser, "model.vae=tiny")


def run(args: argparse.Namespace) -> int:
    """Write the clip as it is generated; nothing but the contact sheet's chunks is kept."""
    from echo_ray.config import EchoConfig, from_mapping, with_overrides
    from echo_ray.engine.build import build_engine
    from echo_ray.engine.clip import contact_sheet, write_clip
    from echo_ray.errors import InvalidRequestError
    from echo_ray.session.chunk import named_words
    from echo_ray.session.rules import check_prompt, check_seed

    config = from_mapping(EchoConfig, with_overrides({}, args.assignments))
    check_prompt(args.prompt, config.limits)
    check_seed(args.seed)
    if not 0 < args.seconds <= 3600:
        raise InvalidRequestError(f"--seconds {args.seconds}: give more than 0, at most 3600")
    if not args.out.resolve().parent.is_dir():
        raise InvalidRequestError(f"--out {args.out}: its folder does not exist; create it first")
    switches = sorted(_switch(text) for text in args.switch)
    for _, prompt in switches:
        check_prompt(prompt, config.limits, param="switch")
    engine = build_engine(config.model)
    clip = _clip(args.clip, engine, config.limits)
    for at, prompt in [(0.0, args.prompt), *switches]:
        if ignored := named_words(engine.understood(prompt)[1]):
            since = f" (from second {at:g})" if at else ""
            print(f"not understood: {', '.join(ignored)}{since}")
    kept: list[Chunk] = []
    started = time.perf_counter()
    chunks = _generate(engine, args.prompt, args.seed, args.seconds, switches, clip)
    frames = write_clip(args.out, _keeping(chunks, kept, args.sheet), engine.shape.fps)
    seconds = time.perf_counter() - started
    if args.sheet:
        args.sheet.write_bytes(contact_sheet(kept, columns=6))
    print(
        f"{args.out}: {frames} frames, {frames / engine.shape.fps:.2f} s of video in "
        f"{seconds:.1f} s ({frames / seconds:.0f} frames/s, generated, decoded and encoded)"
    )
    return 0


def _generate(
    engine: EchoEngine,
    prompt: str,
    seed: int,
    seconds: float,
    switches: list[tuple[float, str]],
    clip: bytes,
) -> Iterator[Chunk]:
    """Chunks until `seconds` of video are there; a switch applies from the chunk it falls into."""
    from tqdm import tqdm

    shape, state = engine.shape, engine.open(prompt, seed, clip)
    total = next(n for n in range(1, 10**6) if shape.start_s(n) >= seconds)
    waiting = switches
    for index in tqdm(range(total), unit="chunk"):
        due = [text for at, text in waiting if at <= shape.start_s(index)]
        waiting = waiting[len(due) :]
        yield engine.step(state, due)


def _clip(file: Path | None, engine: EchoEngine, limits: LimitsSection) -> bytes:
    """Frames of the file that the video begins with; none without a file."""
    from echo_ray.engine.upload import read_clip
    from echo_ray.errors import ClipInvalid

    if file is None:
        return b""
    try:
        data = file.read_bytes()
    except OSError as e:
        raise ClipInvalid(f"--clip {file}: cannot be read: {e.strerror or e}", param="clip") from e
    return read_clip(data, engine.shape, limits)


def _keeping(chunks: Iterator[Chunk], kept: list[Chunk], sheet: Path | None) -> Iterator[Chunk]:
    for chunk in chunks:
        if sheet:
            kept.append(chunk)
        yield chunk


def _switch(text: str) -> tuple[float, str]:
    from echo_ray.errors import InvalidRequestError

    second, sep, prompt = text.partition("=")
    try:
        at = float(second)
    except ValueError:
        at = -1.0
    if not sep or not prompt.strip() or at < 0:
        raise InvalidRequestError(
            f"--switch {text!r}: write SECOND=PROMPT, e.g. 5='a blue square'", param="switch"
        )
    return at, prompt
