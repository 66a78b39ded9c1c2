"""How many more sessions a device has room for, from what its chunks really cost."""

from __future__ import annotations

import math

from echo_ray.config import require

MARGIN = 0.1
"""Part of the device's time that is kept free: snapshots, encoding, one chunk that takes longer."""
SMOOTHING = 0.1
"""Weight of the newest chunk in the mean."""


def slots(*, chunk_seconds: float, chunk_s: float, limit: int, margin: float = MARGIN) -> int:
    """How many realtime sessions a device has room for.

    `chunk_seconds` is compute per chunk and `chunk_s` its duration. There is always room for one,
    whatever was measured before, or not yet: a bad hour would never be measured away.
    """
    require(chunk_seconds >= 0, "chunk_seconds", chunk_seconds, "0 or more")
    require(chunk_s > 0, "chunk_s", chunk_s, "more than 0")
    require(0 <= margin < 1, "margin", margin, "0 to less than 1")
    # The small addend keeps 0.9 / 0.3 at 3: the quotient of two rounded numbers may fall short.
    fits = math.floor(chunk_s * (1 - margin) / chunk_seconds + 1e-9) if chunk_seconds else 1
    return min(max(1, fits), limit)


def free_slots(
    *, chunk_seconds: float, chunk_s: float, sessions: int, limit: int, margin: float = MARGIN
) -> int:
    """How many more of them fit beside the `sessions` that run."""
    found = slots(chunk_seconds=chunk_seconds, chunk_s=chunk_s, limit=limit, margin=margin)
    return max(0, found - sessions)


def smoothed(mean_s: float, newest_s: float) -> float:
    """The exponential mean of chunk seconds after one more chunk."""
    if mean_s == 0:
        return newest_s
    return mean_s + SMOOTHING * (newest_s - mean_s)
