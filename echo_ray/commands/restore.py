"""`echo-ray restore`: bring sessions back from S3 after Redis lost them.

A running service does it by itself; this is for one that is not running yet, and for single
sessions that could not be brought back then.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from echo_ray.commands.settings import add_settings

if TYPE_CHECKING:
    from echo_ray.storage.restore import Report, Restorer

HELP = "bring sessions back from S3 after Redis lost them"
INCOMPLETE = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="as for `echo-ray serve`")
    parser.add_argument(
        "--session",
        action="append",
        metavar="ID",
        help="only this one, whether Redis lost everything or not; may be repeated",
    )
    add_settings(parser, "storage.backend=tiered")


def run(args: argparse.Namespace) -> int:
    """Print what became of each session; 1 if one could not be brought back."""
    from echo_ray.clock import SystemClock
    from echo_ray.commands.serve import default_config, read_application
    from echo_ray.config import EchoConfig, from_mapping, with_overrides
    from echo_ray.errors import ConfigError
    from echo_ray.storage.open import open_restorer

    app = read_application(args.config or default_config())
    settings = with_overrides(app.get("args") or {}, args.assignments)
    storage = from_mapping(EchoConfig, settings).storage
    restorer = open_restorer(storage, SystemClock())
    if restorer is None:
        raise ConfigError(
            f"storage.backend: {storage.backend} keeps nothing that outlives its directory; "
            "restore is for s3 and tiered",
            param="storage.backend",
        )
    try:
        return _restore(restorer, args.session)
    finally:
        restorer.close()


def _restore(restorer: Restorer, session_ids: list[str] | None) -> int:
    if session_ids:
        report = restorer.restore(session_ids)
    elif restorer.lost():
        report = restorer.restore_all()
    else:
        for line in _nothing_lost(restorer.missing()):
            print(line)
        return 0
    for line in _lines(report):
        print(line)
    return INCOMPLETE if report.refused else 0


def _nothing_lost(missing: list[str]) -> Iterator[str]:
    yield "nothing is lost: Redis holds the sessions of this deployment"
    for session_id in missing:
        yield f"{session_id}  only in S3: it was deleted; --session {session_id} brings it back"


def _lines(report: Report) -> Iterator[str]:
    for session_id in report.brought_back:
        yield f"{session_id}  brought back"
    for session_id in report.there:
        yield f"{session_id}  is there"
    for session_id, error in report.refused.items():
        yield f"{session_id}  {error.code}: {error.message}"
    if not (report.brought_back or report.there or report.refused):
        yield "S3 holds no session under storage.s3.prefix: nothing to bring back"
