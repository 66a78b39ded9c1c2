"""S3 requests on threads of their own, tried again while that can help, ended in a known time.

A request can hang where no socket timeout reaches (name resolution, fetching credentials, a server
that sends a byte now and then). So whoever waits does so for a bounded time and leaves the request
behind; what it does after that is made harmless by whoever asked for it (conditional writes).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from itertools import count
from typing import TypeVar

from echo_ray.errors import StoreUnavailable
from echo_ray.storage.s3_errors import FAILURES, Place, passing

_T = TypeVar("_T")

ATTEMPTS = 6
"""How often one request is sent at most."""
_FIRST_PAUSE_S = 0.1


def pause_s(failed: int, draw: float) -> float:
    """How long to wait after `failed` attempts; `draw` in 0..1 spreads those who failed together.

    At most 3.1 s in all before the last attempt.
    """
    return _FIRST_PAUSE_S * float(2 ** (failed - 1)) * (0.5 + draw / 2)


class Deadline:
    """When a call has to be over; `cancel` is now."""

    def __init__(self, seconds: float) -> None:
        self._until_s = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left, 0 or less when it is over."""
        return self._until_s - time.monotonic()

    def cancel(self) -> None:
        self._until_s = 0.0


class S3Calls:
    """Runs requests, at most `threads` at a time."""

    def __init__(self, place: Place, *, threads: int, timeout_s: float) -> None:
        self._place = place
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="s3")

    def run(self, request: Callable[[], _T], deadline: Deadline) -> _T:
        """Send it and wait. Raises what it raises last, or `StoreUnavailable` when time is up."""
        return self.wait(self.start(request, deadline), deadline)

    def start(self, request: Callable[[], _T], deadline: Deadline) -> Future[_T]:
        """Send it as soon as a thread is free. Raises `StoreUnavailable` after `close`."""
        try:
            return self._pool.submit(_attempts, request, deadline)
        except RuntimeError as error:
            raise StoreUnavailable(f"{self._place}: the store is closed; open it again") from error

    def wait(self, future: Future[_T], deadline: Deadline) -> _T:
        """Its result. Raises what it raised last, or `StoreUnavailable` when time is up."""
        try:
            return future.result(max(0.0, deadline.left()))
        except (TimeoutError, CancelledError) as error:
            if future.done() and not future.cancelled():
                raise
            future.cancel()
            raise self.late() from error

    def late(self) -> StoreUnavailable:
        """The error of a call whose time is up."""
        return StoreUnavailable(
            f"{self._place} did not finish within {self._timeout_s:g} s; see to the network and "
            "the server, or raise the timeout of the store",
            retry_after_s=self._timeout_s,
        )

    def close(self) -> None:
        """Take no more requests; those under way end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _attempts(request: Callable[[], _T], deadline: Deadline) -> _T:
    for failed in count(1):
        try:
            return request()
        except FAILURES as error:
            rest_s = pause_s(failed, random.random())
            if failed == ATTEMPTS or not passing(error) or rest_s >= deadline.left():
                raise
            time.sleep(rest_s)
    raise AssertionError("unreachable")
