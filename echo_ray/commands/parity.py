"""`echo-ray parity DIR`: compare our classes with a folder of the reference's numbers."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "compare the engine with a folder of parity fixtures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder with manifests (*.json) and tensors")


def run(args: argparse.Namespace) -> int:
    """One line a case; 1 if any case failed."""
    import torch

    from echo_ray.evaluation.parity import run_folder

    torch.set_num_threads(1)
    counts: dict[str, int] = {}
    for verdict in run_folder(args.folder):
        print(verdict.line(), flush=True)
        counts[verdict.status] = counts.get(verdict.status, 0) + 1
    passed, failed, other = (counts.get(s, 0) for s in ("pass", "FAIL", "not built"))
    print(f"{passed} passed, {failed} failed, {other} not built")
    return 1 if failed else 0
