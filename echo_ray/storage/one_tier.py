"""What a snapshot store of one tier says where a tiered one has something to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from echo_ray.storage.interface import SweptStore


class OneTier:
    """The part of the contract that is trivial there: a blob is as durable as it will ever be."""

    @property
    def tiers(self: SweptStore) -> Mapping[str, SweptStore]:
        return {self.name: self}

    def make_durable(self, session_id: str, snapshot_id: str) -> None:
        """Nothing to do."""

    def make_durable_soon(self, session_id: str, snapshot_id: str) -> None:
        """Nothing to do."""

    def newest_durable(self, session_id: str, newest_first: Sequence[str]) -> str | None:
        """None: no blob outlives the others."""
        return None

    def debt(self) -> int:
        return 0

    def counts(self) -> Mapping[str, int]:
        return {}

    def close(self) -> None:
        """Nothing to let go of."""
