"""Whether a Redis server still holds what this deployment put there: one key that says so.

`PREFIX:identity` is set when the directory is whole: empty for the first time, or filled again from
the durable store. It is lost with everything else, and set to something new afterwards. So what is
missing between two looks at the same identity was never there or was deleted.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from echo_ray.errors import StoreUnavailable
from echo_ray.storage.redis_link import RedisLink

RETRY_S = 1.0


class Identity:
    """The identity key under a prefix."""

    def __init__(self, link: RedisLink, prefix: str) -> None:
        self._link = link
        self._key = f"{prefix}:identity"

    def lost(self) -> bool:
        """Whether there is none: nothing was ever kept here, or everything was lost."""
        (found,) = self._link.run(("GET", self._key))
        return found is None

    def set(self) -> None:
        """Say that the directory is whole, unless somebody else has said so."""
        self._link.run(("SET", self._key, secrets.token_hex(16), "NX"))

    @contextmanager
    def unbroken(self) -> Iterator[None]:
        """What is read inside is the whole truth.

        Raises `StoreUnavailable` if it may not be, because the directory was lost.
        """
        before = self._look()
        yield
        if self._look() != before:
            raise self._incomplete()

    def _look(self) -> bytes:
        (found,) = self._link.run(("GET", self._key))
        if found is None:
            raise self._incomplete()
        held: bytes = found
        return held

    def _incomplete(self) -> StoreUnavailable:
        return StoreUnavailable(
            f"{self._link.address}: the directory has lost its sessions or is new; a router brings "
            "them back from the durable store first (docs/operations.md); retry",
            retry_after_s=RETRY_S,
        )
