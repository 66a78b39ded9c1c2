"""`python -m echo_ray.training`: from nothing to the weights of a preset."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from echo_ray.errors import ConfigError, EchoError
from echo_ray.model.group_codec import GroupCodec
from echo_ray.preset import Preset, load_preset
from echo_ray.training.bank import load_or_build
from echo_ray.training.codec_stage import CodecStage
from echo_ray.training.dit_stage import DitStage
from echo_ray.training.loop import run_stage
from echo_ray.training.recipe import Budget, Recipe
from echo_ray.training.trainable import new_codec

CODEC_SHARE = 0.25
"""Of the minutes given to all stages."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages asked for; 0 on success, 1 with a message on a user's mistake."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        train(load_preset(args.preset), recipe_of(args), args)
    except EchoError as e:
        sys.stderr.write(f"error: {e.message}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m echo_ray.training", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and weights")
    parser.add_argument("--preset", default="echo-tiny")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="wall time of the stages together")
    length.add_argument("--steps", type=int, help="steps of each stage")
    parser.add_argument("--stage", choices=("codec", "dit", "all"), default="all")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoints")
    parser.add_argument("--seed", type=int, default=Recipe().seed)
    parser.add_argument("--batch", type=int, default=Recipe().dit_batch, help="clips a step")
    parser.add_argument("--clips", type=int, default=Recipe().clips, help="clips in the bank")
    parser.add_argument("--workers", type=int, default=1, help="processes that render the bank")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler; faster")
    return parser


def recipe_of(args: argparse.Namespace) -> Recipe:
    recipe = Recipe(seed=args.seed, dit_batch=args.batch, clips=args.clips)
    if args.steps is not None:
        recipe = replace(recipe, codec_steps=args.steps, dit_steps=args.steps)
    if args.minutes is not None and args.minutes <= 0:
        raise ConfigError(f"--minutes: {args.minutes} is not allowed: more than 0")
    return recipe


def train(preset: Preset, recipe: Recipe, args: argparse.Namespace) -> None:
    """Codec, then bank, then transformer; each picks up what an earlier run left with --resume."""
    share = CODEC_SHARE if args.stage == "all" else 1.0
    minutes: float | None = args.minutes
    if args.stage in ("codec", "all"):
        budget = Budget(
            steps=recipe.codec_steps, minutes=None if minutes is None else minutes * share
        )
        run_stage(
            CodecStage(preset, recipe),
            budget,
            recipe.seed,
            args.out,
            resume=args.resume,
            checkpoint_every_s=recipe.checkpoint_every_s,
        )
    if args.stage == "codec":
        return
    codec = trained_codec(preset, args.out)
    bank = load_or_build(preset, recipe, codec, args.out / "bank.pt", args.workers)
    share = 1 - CODEC_SHARE if args.stage == "all" else 1.0
    budget = Budget(steps=recipe.dit_steps, minutes=None if minutes is None else minutes * share)
    run_stage(
        DitStage(preset, recipe, bank, codec, args.compile),
        budget,
        recipe.seed,
        args.out,
        resume=args.resume,
        checkpoint_every_s=recipe.checkpoint_every_s,
    )


def trained_codec(preset: Preset, out: Path) -> GroupCodec:
    """The codec of the folder's codec stage. Raises `ConfigError` if there is none."""
    file = out / "codec.pt"
    if not file.exists():
        raise ConfigError(f"{file} does not exist: train the codec first (--stage codec or all)")
    codec = new_codec(preset)
    codec.load_state_dict(torch.load(file, weights_only=True)["stage"]["codec"])
    return codec.eval().requires_grad_(False)


if __name__ == "__main__":
    sys.exit(main())
