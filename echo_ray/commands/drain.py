"""`echo-ray drain HOST`: have a replica's sessions moved, and wait until none is left.

For the end of a pod: a preStop hook calls it in the pod of the replica. It ends at once with status
0 where no replica listens, and with 1 if sessions are left when the time is over; what is left is
parked, or taken over after the replica's death.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from echo_ray.errors import ConfigError

if TYPE_CHECKING:
    import httpx

HELP = "have one replica's sessions moved before its machine goes away"
LOOK_S = 0.25
ANSWER_S = 2.0
MARGIN_S = 2.0
"""After its deadline a replica gives up what is left; that takes a moment."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("host", help="address of the replica's node")
    parser.add_argument("--port", type=int, required=True, help="its http.replica_port")
    parser.add_argument(
        "--within", type=float, required=True, metavar="SECONDS", help="move them within this time"
    )
    parser.add_argument(
        "--secret-file", metavar="FILE", help="its access.replica_secret_file, with access on"
    )


def run(args: argparse.Namespace) -> int:
    """Ask for the drain, and again until the replica says that it is drained."""
    import httpx

    if not 1 <= args.port <= 65535:
        raise ConfigError(f"--port {args.port} is not allowed: 1 to 65535; see http.replica_port")
    if not 0 < args.within <= 3600:
        raise ConfigError(f"--within {args.within} is not allowed: more than 0, at most 3600")
    host = f"[{args.host}]" if ":" in args.host else args.host
    url, shown = f"http://{host}:{args.port}", _shown(args.secret_file)
    with httpx.Client(base_url=url, headers=shown, timeout=ANSWER_S) as client:
        return drain(client, args.within, time.monotonic, time.sleep)


def _shown(secret_file: str | None) -> dict[str, str]:
    """The header by which a replica knows its routers. Raises `ConfigError` for the file."""
    from echo_ray.clock import SystemClock
    from echo_ray.serve.access_files import Secret
    from echo_ray.serve.access_replica import replica_headers

    return replica_headers(Secret("access.replica_secret", None, secret_file, SystemClock()))


def drain(
    client: httpx.Client,
    within_s: float,
    now: Callable[[], float],
    sleep: Callable[[float], None],
) -> int:
    """The exit status: 0 when the replica is drained or away, else 1, with a line that says why."""
    import httpx

    until_s, state = now() + within_s, "silent"
    while (left_s := until_s - now()) > -MARGIN_S:
        try:
            # Asked again, a replica keeps the earliest deadline.
            answer = client.post("/v1/drain", params={"within_ms": int(max(0.0, left_s) * 1000)})
            answer.raise_for_status()
            state = str(answer.json()["state"])
        except httpx.ConnectError:
            return 0
        except httpx.TimeoutException:
            # It is busy, or hangs; there is time to ask again.
            state = "silent"
        except (httpx.HTTPError, ValueError, KeyError) as e:
            print(f"the replica at {client.base_url} refused to drain: {e}", file=sys.stderr)
            return 1
        if state == "drained":
            return 0
        sleep(LOOK_S)
    print(f"the replica at {client.base_url} is {state} after {within_s:g} s", file=sys.stderr)
    return 1
