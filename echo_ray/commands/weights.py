"""`echo-ray weights verify | convert | synthesize | average`: checkpoints and what we make of them.

`convert SRC DST` reads the published files below SRC and writes one safetensors folder with a
manifest; `verify DIR` checks such a folder, or says whether published files would convert;
`synthesize DST` writes random weights in the published layout; `average A B DST` what lies between
two trainings of one model.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from echo_ray.weights.sources import Options

HELP = "check, convert or make up the weights of a model"
PRESET = "echo-infinity-1.3b"
FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verify = verbs.add_parser("verify", help="check a converted folder, or published files")
    verify.add_argument("folder", type=Path, metavar="DIR")
    convert = verbs.add_parser("convert", help="published files to one safetensors folder")
    convert.add_argument("src", type=Path, metavar="SRC", help="searched with all its folders")
    convert.add_argument("dst", type=Path, metavar="DST", help="a new folder")
    convert.add_argument(
        "--dtype", choices=("float32", "bfloat16", "keep"), help="default: the preset's"
    )
    convert.add_argument("--overwrite", action="store_true", help="replace the weights in DST")
    for sub in (verify, convert):
        _add_sources(sub)
    synthesize = verbs.add_parser("synthesize", help="random weights in the published layout")
    synthesize.add_argument("dst", type=Path, metavar="DST", help="a new folder")
    synthesize.add_argument("--seed", type=int, default=0)
    synthesize.add_argument(
        "--only", metavar="PART,PART", help="of dit, memory, text, codec, small_codec"
    )
    average = verbs.add_parser("average", help="what lies between two folders of one model")
    average.add_argument("first", type=Path, metavar="A")
    average.add_argument("second", type=Path, metavar="B")
    average.add_argument("dst", type=Path, metavar="DST", help="a new folder")
    average.add_argument("--share", type=float, default=0.5, help="of B; default: 0.5")
    verify.add_argument("--preset", help=f"default: the one that DIR was made for, else {PRESET}")
    for sub in (convert, synthesize):
        sub.add_argument(
            "--preset", default=PRESET, help=f"name or folder with preset.toml; default: {PRESET}"
        )


def _add_sources(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("published files, where SRC does not tell them apart")
    group.add_argument("--generator", type=Path, help="echo_infinity.pt")
    group.add_argument("--lora", type=Path, help="the adapter of the long model")
    group.add_argument("--lora-alpha", type=float, help="default: the adapter's rank")
    group.add_argument("--memory", type=Path, help="a memory encoder in a file of its own")
    group.add_argument("--vae", type=Path, help="Wan2.1_VAE.pth")
    group.add_argument("--text", type=Path, help="models_t5_umt5-xxl-enc-bf16.pth")
    group.add_argument("--tokenizer", type=Path, help="folder with the umT5 tokenizer.json")
    group.add_argument("--small-codec", type=Path, help="taew2_1.pth")
    group.add_argument("--ema", action="store_true", help="averaged weights, if there are any")


def run(args: argparse.Namespace) -> int:
    """0 if it worked, 1 if `verify` found a reason against these weights."""
    import torch

    torch.set_num_threads(1)
    verbs = {"verify": _verify, "convert": _convert, "synthesize": _synthesize, "average": _average}
    return verbs[args.verb](args)


def _options(args: argparse.Namespace) -> Options:
    from echo_ray.weights.sources import Options

    return Options(**{f.name: getattr(args, f.name) for f in fields(Options)})


def _verify(args: argparse.Namespace) -> int:
    from echo_ray.preset import load_preset
    from echo_ray.weights.manifest import FILE, read_manifest
    from echo_ray.weights.verify import verify

    if args.preset is None and (args.folder / FILE).exists():
        preset = read_manifest(args.folder).config
    else:
        preset = load_preset(args.preset or PRESET)
    report = verify(args.folder, preset, _options(args))
    for line in report.lines:
        print(line)
    for problem in report.problems:
        print(f"WRONG: {problem}", file=sys.stderr)
    return 0 if report.ok else FAILED


def _convert(args: argparse.Namespace) -> int:
    from echo_ray.preset import load_preset
    from echo_ray.weights.convert import check_target, convert
    from echo_ray.weights.plan import make_plan

    preset = load_preset(args.preset)
    check_target(args.dst, overwrite=args.overwrite)
    plan = make_plan(args.src, preset, _options(args), args.dtype)
    for note in plan.notes:
        print(note, flush=True)
    manifest = convert(plan, args.dst, overwrite=args.overwrite)
    for name, record in manifest.files.items():
        print(f"{name:<28} {record.bytes:>12} bytes  {record.sha256[:16]}")
    print(f"{args.dst}: {preset.name}, digest {manifest.digest}")
    return 0


def _synthesize(args: argparse.Namespace) -> int:
    from echo_ray.preset import load_preset
    from echo_ray.weights.synthetic import synthesize

    only = None if args.only is None else [part.strip() for part in args.only.split(",")]
    files = synthesize(load_preset(args.preset), args.dst, seed=args.seed, only=only)
    for file in files:
        print(f"{file.relative_to(args.dst)!s:<40} {file.stat().st_size:>12} bytes")
    return 0


def _average(args: argparse.Namespace) -> int:
    from echo_ray.weights.average import average

    manifest = average(args.first, args.second, args.dst, args.share)
    print(f"{args.dst}: {manifest.config.name}, digest {manifest.digest}")
    return 0
