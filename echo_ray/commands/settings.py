"""`--set a.b=c`: the way to change a value of the configuration from any command."""

from __future__ import annotations

import argparse


def add_settings(parser: argparse.ArgumentParser, example: str) -> None:
    """Give a command `--set`; what was set is `args.assignments`."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        dest="assignments",
        help=f"change a value of the configuration, e.g. {example}; may be given several times",
    )
