"""`echo-ray seam`: how many trailing latents a decoder needs to come back without a seam.

Without `--weights` the Wan decoder has random weights at a small width, in the published structure:
then only the last row carries over, for it follows from the structure.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from echo_ray.model.codec import Codec
    from echo_ray.preset import Preset

HELP = "measure how visible a decoder's restart is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="echo-infinity-1.3b", help="name or folder of a preset")
    parser.add_argument("--vae", help="wan or tiny; default: the preset's own")
    parser.add_argument("--weights", type=Path, help="a converted weights folder")
    parser.add_argument("--width", type=int, default=8, help="of a random Wan VAE; published: 96")
    parser.add_argument("--size", type=int, default=4, help="latents a side")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """One line for every count of latents, the last one being the codec's own."""
    import torch

    from echo_ray.errors import InvalidRequestError
    from echo_ray.evaluation.seam import CHUNK, COUNTS, measure, smooth_latents
    from echo_ray.preset import load_preset, with_codec

    for name in ("width", "size"):
        if not 1 <= getattr(args, name) <= 1024:
            raise InvalidRequestError(f"--{name} {getattr(args, name)}: give 1 to 1024", param=name)
    torch.set_num_threads(1)
    preset = with_codec(load_preset(args.preset), args.vae)
    torch.manual_seed(args.seed)
    codec = _codec(preset, args.weights, args.width)
    enough = codec.rebuild_latents
    counts = [n for n in COUNTS if n < enough] + [enough]
    size = (enough + 2 * CHUNK, preset.dit.in_channels, args.size, args.size)
    print("weights:", args.weights or f"random, seed {args.seed}")
    print("latents  seam dB  bit-exact")
    with torch.inference_mode():
        for seam in measure(codec, smooth_latents(size, args.seed), counts):
            exact = "yes" if seam.exact else "no"
            print(f"{seam.latents:7}  {seam.psnr_db:7.1f}  {exact}", flush=True)
    return 0


def _codec(preset: Preset, weights: Path | None, width: int) -> Codec:
    """The preset's codec with its weights, or with random ones, the Wan VAE then of this width."""
    from dataclasses import replace

    import torch

    from echo_ray.model.state_dict import load_strict
    from echo_ray.preset import WanVaeShape
    from echo_ray.weights.folder import WeightsFolder
    from echo_ray.weights.parts import build_codec, codec_part

    shape = preset.codec
    if weights is None:
        shape = replace(shape, dim=width) if isinstance(shape, WanVaeShape) else shape
        codec = build_codec(shape, preset.dit)
    else:
        codec = build_codec(shape, preset.dit)
        tensors = WeightsFolder.open(weights).part(codec_part(shape), dtype=torch.float32)
        load_strict(codec, tensors, str(weights))
    return codec.eval().requires_grad_(requires_grad=False)
