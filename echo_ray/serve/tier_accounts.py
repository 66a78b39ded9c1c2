"""What happens between the tiers of a snapshot store, as metrics."""

from __future__ import annotations

from collections import Counter

from echo_ray.serve.telemetry import Telemetry
from echo_ray.storage.interface import SnapshotStore


class TierAccounts:
    """Carries a store's counts over into counters; for one thread."""

    def __init__(self, store: SnapshotStore, telemetry: Telemetry) -> None:
        self._store = store
        self._telemetry = telemetry
        self._told: Counter[str] = Counter()

    def tell(self) -> None:
        """Set the gauge of the debt and count what happened since the last time."""
        self._telemetry.set("snapshot_debt", self._store.debt())
        counts = Counter(self._store.counts())
        for event, more in (counts - self._told).items():
            self._telemetry.count("snapshot_tier_events", more, event=event)
        self._told = counts
