"""`echo-ray parity DIR`: compare our classes with a folder of the reference's numbers."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "compare the engine with a folder of parity fixtures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder with manifests (*.json) and tensors")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="bf16 compares whole outputs, with tolerances of its own",
    )


def run(args: argparse.Namespace) -> int:
    """One line a case; 1 if any case failed."""
    import torch

    from echo_ray.errors import ConfigError
    from echo_ray.evaluation.parity import Target, run_folder

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device on this machine; use cpu", param="device")
    torch.set_num_threads(1)
    # A convolution in TF32 keeps ten bits; float32 parity needs all of them.
    torch.backends.cudnn.allow_tf32 = False
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    counts: dict[str, int] = {}
    for verdict in run_folder(args.folder, Target(torch.device(args.device), dtype)):
        print(verdict.line(), flush=True)
        counts[verdict.status] = counts.get(verdict.status, 0) + 1
    passed, failed = counts.get("pass", 0), counts.get("FAIL", 0)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0
