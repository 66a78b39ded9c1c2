"""What must hold after every event, however the world behaves; a breach ends the run.

The ledger keeps books of its own, from what reaches the stores and what reaches the viewers, and
believes nobody: not the directory about its log, not an owner about its epoch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from sim.kernel import World
from sim.stream import Oracle

from echo_ray.session.records import ControlEntry, Lease, SessionRecord, SessionState, SnapshotRef


class Breach(AssertionError):
    """Something happened that never may."""


@dataclass(slots=True)
class Book:
    """One session as it has to be."""

    oracle: Oracle
    stops_idle: bool
    """Whether chunks are made for readers only."""
    epoch: int = 0
    owned: bool = False
    state: SessionState = SessionState.LIVE
    published: list[str] = field(default_factory=list)
    sealed: int = 0
    switches: dict[int, list[str]] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    acknowledged: set[str] = field(default_factory=set)
    wanted: int = 0
    """The first chunk that no viewer ever had a right to ask for."""


class Ledger:
    """Every promise, by session, as the stores and the viewers see it kept."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.books: dict[str, Book] = {}
        self.counts: Counter[str] = Counter()

    def created(self, record: SessionRecord, *, stops_idle: bool) -> None:
        self.books[record.id] = Book(Oracle(record), stops_idle)

    # Owners

    def claimed(self, lease: Lease) -> None:
        """Epochs only rise, and what is closed stays so."""
        book = self.books[lease.session_id]
        if lease.epoch <= book.epoch:
            self.breach(f"{lease.session_id}: epoch {lease.epoch} was claimed twice")
        if book.state is SessionState.CLOSED:
            self.breach(f"{lease.session_id}: claimed after it was closed")
        book.epoch, book.owned, book.state = lease.epoch, True, SessionState.LIVE
        self.counts["claims"] += 1
        self._world.note(
            "{} is claimed for {}, epoch {}", lease.session_id, lease.owner, lease.epoch
        )

    def released(self, lease: Lease, state: str) -> None:
        """An owner gives its own session up, not another's."""
        book = self._writes(lease, "releases the session")
        book.owned, book.state = False, SessionState(state)
        self._world.note("{} is released by {}, {}", lease.session_id, lease.owner, state)

    def set(self, session_id: str, state: SessionState) -> None:
        """Somebody pauses, resumes or closes the session: its owner may write nothing more."""
        book = self.books[session_id]
        book.state = state
        if state is not SessionState.LIVE:
            book.owned = False
        self._world.note("{} is set {}", session_id, state.value)

    # What owners write

    def sealed(self, lease: Lease, index: int, entries: Sequence[ControlEntry]) -> None:
        """What a chunk is made under is all that was ever accepted for it."""
        book = self._writes(lease, f"seals {index}")
        book.sealed = max(book.sealed, index + 1)
        if [e.prompt for e in entries] != book.switches.get(index, []):
            self.breach(f"{lease.session_id}: chunk {index} is sealed with {entries}")

    def committed(self, lease: Lease, index: int, digest: str) -> None:
        """One epoch's writes win, and every chunk is what an undisturbed run makes."""
        book = self._writes(lease, f"commits {index}")
        self.counts["commits"] += 1
        if index != len(book.published):
            self.breach(f"{lease.session_id}: chunk {index} committed after {len(book.published)}")
        if index >= book.sealed:
            self.breach(f"{lease.session_id}: chunk {index} was never sealed")
        expected = book.oracle.digest(index, book.switches)
        if digest != expected:
            self.breach(f"{lease.session_id}: chunk {index} is {digest}, not {expected}")
        if book.stops_idle and index >= book.wanted:
            self.breach(f"{lease.session_id}: nobody wanted chunk {index}")
        book.published.append(digest)

    def recorded(self, lease: Lease, ref: SnapshotRef) -> None:
        """A fenced owner records no snapshot, and nobody one of what is not committed."""
        book = self._writes(lease, "records a snapshot")
        if ref.chunk_index > len(book.published):
            self.breach(f"{lease.session_id}: a snapshot at {ref.chunk_index} is ahead")

    def _writes(self, lease: Lease, what: str) -> Book:
        book = self.books[lease.session_id]
        if lease.epoch != book.epoch:
            self.breach(f"{lease.session_id}: epoch {lease.epoch} {what} after a newer one")
        if not book.owned:
            self.breach(f"{lease.session_id}: {lease.owner} {what} though it is {book.state}")
        return book

    # Events

    def appended(self, session_id: str, entry: ControlEntry, at_chunk: int | None) -> None:
        """An event is placed once, where it was asked for, and never before a sealed chunk."""
        book = self.books[session_id]
        earlier = book.events.get(entry.event_id)
        if earlier is not None:
            if earlier != entry.chunk:
                self.breach(f"{session_id}: {entry.event_id} is placed at {entry.chunk} as well")
            return
        if entry.chunk < book.sealed or at_chunk not in (None, entry.chunk):
            self.breach(f"{session_id}: {entry.event_id} is placed at {entry.chunk}")
        book.events[entry.event_id] = entry.chunk
        book.switches.setdefault(entry.chunk, []).append(entry.prompt)

    def acknowledged(self, session_id: str, entry: ControlEntry) -> None:
        """An event that is acknowledged is durable, at the chunk that the answer names."""
        book = self.books[session_id]
        if book.events.get(entry.event_id) != entry.chunk:
            self.breach(f"{session_id}: event {entry.event_id} is not at {entry.chunk}")
        if entry.event_id not in book.acknowledged:
            book.acknowledged.add(entry.event_id)
            self.counts["switches"] += 1

    # Viewers

    def wants(self, session_id: str, until: int) -> None:
        """A viewer may ask for chunks below `until`."""
        book = self.books[session_id]
        book.wanted = max(book.wanted, until)

    def delivered(
        self, session_id: str, viewer: str, index: int, expected: int, digest: str
    ) -> None:
        """No viewer misses, repeats or reorders a chunk, and none is shown uncommitted."""
        self.counts["deliveries"] += 1
        published = self.books[session_id].published
        if index != expected:
            self.breach(f"{viewer}: chunk {index} of {session_id} where {expected} was due")
        if index >= len(published):
            self.breach(f"{viewer}: chunk {index} of {session_id} was never committed")
        if digest != published[index]:
            self.breach(f"{viewer}: chunk {index} of {session_id} is torn")

    # The end

    def finished(self, session_id: str, log: Sequence[ControlEntry]) -> None:
        """The log holds every event once, where it was placed, and every one acknowledged."""
        book = self.books[session_id]
        if {e.event_id: e.chunk for e in log} != book.events or len(log) != len(book.events):
            self.breach(f"{session_id}: the log is {log}")
        if not book.acknowledged <= book.events.keys():
            self.breach(f"{session_id}: of {book.acknowledged} some are lost")

    def breach(self, text: str) -> None:
        """Say what broke, and end the run."""
        self._world.note("BREACH {}", text)
        raise Breach(text)
