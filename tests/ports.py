"""Free ports for the servers of tests."""

from __future__ import annotations

import contextlib
import random
import socket

BELOW = 32_000
"""From 32,768 on the system gives ports to outgoing connections, of which Ray opens many."""
FROM = 20_000
"""Ray's workers take those below."""


def free_port() -> int:
    """A port that nobody listens on, of those that nobody is given unasked."""
    while True:
        port = random.randrange(FROM, BELOW)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))
            return port
