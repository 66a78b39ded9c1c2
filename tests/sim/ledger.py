"""What must hold after every event, however the world behaves; a breach ends the run."""

from __future__ import annotations

from collections.abc import Sequence

from sim.kernel import World
from sim.stream import Oracle

from echo_ray.session.records import ControlEntry, Lease, SessionRecord, SnapshotRef


class Breach(AssertionError):
    """Something happened that never may."""


class Ledger:
    """Every promise, by session, as the stores and the viewers see it kept."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._oracles: dict[str, Oracle] = {}
        self._epochs: dict[str, int] = {}
        self._published: dict[str, dict[int, str]] = {}
        self._acknowledged: dict[str, dict[str, int]] = {}
        self.commits = 0
        self.deliveries = 0

    def created(self, record: SessionRecord) -> None:
        self._oracles[record.id] = Oracle(record)
        self._epochs[record.id] = 0
        self._published[record.id] = {}
        self._acknowledged[record.id] = {}

    def claimed(self, lease: Lease) -> None:
        """Epochs only rise."""
        if lease.epoch <= self._epochs[lease.session_id]:
            self._breach(f"{lease.session_id}: epoch {lease.epoch} was claimed twice")
        self._epochs[lease.session_id] = lease.epoch
        self._world.note(f"{lease.session_id} is claimed for {lease.owner}, epoch {lease.epoch}")

    def committed(self, lease: Lease, index: int, digest: str, log: Sequence[ControlEntry]) -> None:
        """One epoch's writes win, and every chunk is what an undisturbed run makes."""
        self.commits += 1
        published = self._published[lease.session_id]
        if index != len(published):
            self._breach(f"{lease.session_id}: chunk {index} committed after {len(published)}")
        if lease.epoch < self._epochs[lease.session_id]:
            self._breach(f"{lease.session_id}: epoch {lease.epoch} writes after a newer one")
        expected = self._oracles[lease.session_id].digest(index, log)
        if digest != expected:
            self._breach(f"{lease.session_id}: chunk {index} is {digest}, not {expected}")
        published[index] = digest

    def recorded(self, lease: Lease, ref: SnapshotRef) -> None:
        """A fenced owner records no snapshot."""
        if lease.epoch < self._epochs[lease.session_id]:
            self._breach(f"{lease.session_id}: epoch {lease.epoch} records a snapshot")
        if ref.chunk_index > len(self._published[lease.session_id]):
            self._breach(f"{lease.session_id}: a snapshot at {ref.chunk_index} is ahead")

    def acknowledged(self, session_id: str, entry: ControlEntry) -> None:
        """An event's answer names one chunk, always the same, and not one that was shown."""
        earlier = self._acknowledged[session_id].setdefault(entry.event_id, entry.chunk)
        if earlier != entry.chunk:
            self._breach(f"{session_id}: event {entry.event_id} moved to {entry.chunk}")

    def delivered(
        self, session_id: str, viewer: str, index: int, expected: int, digest: str
    ) -> None:
        """No viewer misses, repeats or reorders a chunk, and none is shown uncommitted."""
        self.deliveries += 1
        if index != expected:
            self._breach(f"{viewer}: chunk {index} of {session_id} where {expected} was due")
        committed = self._published[session_id].get(index)
        if committed is None:
            self._breach(f"{viewer}: chunk {index} of {session_id} was never committed")
        if digest != committed:
            self._breach(f"{viewer}: chunk {index} of {session_id} is torn")

    def finished(self, session_id: str, log: Sequence[ControlEntry]) -> None:
        """Every acknowledged event is in the log, once, where the answer said."""
        chunks = {e.event_id: e.chunk for e in log}
        if len(chunks) != len(log):
            self._breach(f"{session_id}: an event is in the log twice")
        for event_id, chunk in self._acknowledged[session_id].items():
            if chunks.get(event_id) != chunk:
                self._breach(f"{session_id}: event {event_id} is not at {chunk}")

    def stuck(self, session_id: str, viewer: str, index: int, came: int) -> None:
        """In peace every session goes on."""
        self._breach(f"{viewer}: {session_id} is stuck at {index}: only {came} chunks in peace")

    def _breach(self, text: str) -> None:
        self._world.note(f"BREACH {text}")
        raise Breach(text)
