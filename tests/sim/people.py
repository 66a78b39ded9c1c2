"""Who uses the cluster: viewers that come and go, and clients that switch, pause and stop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sim.kernel import Host, Process, Rung, Sleep
from sim.network import Pipe
from sim.progress import LEAD, LIMIT
from sim.router import Router
from sim.seat import RETENTION
from sim.serving import CLOSED
from sim.stream import CHUNK_S, Segment

from echo_ray.errors import (
    ChunkSealed,
    EchoError,
    EventIdConflict,
    SegmentExpired,
    SessionClosed,
)
from echo_ray.session.records import SessionRecord, SessionState

if TYPE_CHECKING:
    from sim.scenario import Cluster

BUFFER_S = 2.0
"""A viewer begins to play this long after the first chunk came."""
SILENCE_S = 4.0
"""A viewer that gets nothing for so long tries another router."""
TRIES = 20


@dataclass(slots=True, eq=False)
class Viewer:
    """Somebody who watches one session: what came, and how late."""

    name: str
    session_id: str
    next: int = 0
    watching: bool = False
    playing_s: float | None = None
    """When chunk 0 began to play, moved by every stall; None: playing has not begun."""
    worst_stall_s: float = 0.0
    ended: EchoError | None = None


def view(cluster: Cluster, viewer: Viewer, host: Host) -> Process:
    """Watch through one router after the other, with breaks; some come late, for the past."""
    rng, plan = cluster.world.rng, cluster.plan
    late = plan.comings and rng.random() < 0.3
    yield Sleep(rng.uniform(0, plan.troubled_s * 0.7 if late else 2))
    if late:
        viewer.next = max(0, len(cluster.published(viewer)) - rng.randrange(RETENTION))
    while viewer.ended is None:
        router = rng.choice(cluster.routers)
        if not router.host.up:
            yield Sleep(0.2)
            continue
        leaves_s = rng.expovariate(1 / 8) if plan.comings else plan.troubled_s
        viewer.watching = True
        yield from _watch(cluster, viewer, router, host, host.monotonic() + leaves_s)
        viewer.watching = False
        if plan.comings and not cluster.peace and viewer.ended is None:
            viewer.playing_s = None
            yield Sleep(rng.choice([0.01, 1, 8]) * rng.random())
            oldest = len(cluster.published(viewer)) - RETENTION + 1
            viewer.next = max(viewer.next, oldest)


def _watch(
    cluster: Cluster, viewer: Viewer, router: Router, host: Host, leaves_s: float
) -> Process:
    """One connection to one router."""
    out = Pipe(cluster.network, router.host, host, CLOSED)
    acks = Pipe(cluster.network, host, router.host, None)
    cluster.ledger.wants(viewer.session_id, viewer.next + LEAD)
    attach = partial(router.watch, viewer.session_id, viewer.next, out, acks)
    cluster.network.connect(host, router.host, attach, lambda: out.send(CLOSED))
    heard_s = host.monotonic()
    while True:
        now_s = host.monotonic()
        leaving = now_s >= leaves_s and not cluster.peace
        if leaving or now_s - heard_s >= SILENCE_S:
            break
        if not out.items:
            yield Rung(1.0, out.bell)
            continue
        heard_s, item = now_s, out.items.popleft()
        if item == CLOSED:
            break
        if isinstance(item, EchoError):
            _ended(cluster, viewer, item)
            break
        _taken(cluster, viewer, item)
        acks.send(viewer.next)
    out.close()
    acks.send(None)


def _taken(cluster: Cluster, viewer: Viewer, segment: Segment) -> None:
    now_s = cluster.world.now_s
    cluster.ledger.delivered(
        viewer.session_id, viewer.name, segment.index, viewer.next, segment.digest
    )
    if viewer.playing_s is None:
        viewer.playing_s = now_s + BUFFER_S - CHUNK_S * segment.index
    late_s = now_s - (viewer.playing_s + CHUNK_S * segment.index)
    if late_s > 0:
        viewer.worst_stall_s = max(viewer.worst_stall_s, late_s)
        viewer.playing_s += late_s
    viewer.next = segment.index + 1
    cluster.ledger.wants(viewer.session_id, viewer.next + LEAD)


def _ended(cluster: Cluster, viewer: Viewer, error: EchoError) -> None:
    """A viewer hears that it gets no more: for a closed session, or a chunk that is gone."""
    ledger, session_id = cluster.ledger, viewer.session_id
    match error:
        case SessionClosed() if ledger.books[session_id].state is SessionState.CLOSED:
            viewer.ended = error
        case SegmentExpired() if _may_be_gone(cluster, viewer):
            ledger.counts["chunks that were gone"] += 1
            viewer.next, viewer.playing_s = len(cluster.published(viewer)), None
        case _:
            ledger.breach(f"{viewer.name}: {session_id} at {viewer.next} ended: {error!r}")


def _may_be_gone(cluster: Cluster, viewer: Viewer) -> bool:
    """Whether the chunk is out of the retention, or no point is left to make it again from."""
    committed = len(cluster.published(viewer))
    if viewer.next < committed - RETENTION:
        return True
    refs = cluster.store.directory.snapshots(viewer.session_id)
    points = [
        r.chunk_index
        for r in refs
        if r.chunk_index <= viewer.next and (r.session_id, r.id) in cluster.store.blobs
    ]
    return committed > LIMIT and committed - max(points, default=0) > LIMIT


def switch(cluster: Cluster, record: SessionRecord, host: Host) -> Process:
    """Somebody who switches prompts, sure of nothing that is not acknowledged."""
    rng, number = cluster.world.rng, 0
    while not cluster.peace:
        yield Sleep(rng.uniform(0.5, 2 * cluster.plan.switch_every_s))
        number += 1
        ahead = len(cluster.ledger.books[record.id].published) + rng.randrange(6)
        at = ahead if rng.random() < 0.3 else None
        try:
            yield from _switch(cluster, record.id, host, f"e{number}", at)
        except ChunkSealed:
            continue
        except SessionClosed:
            return


def _switch(
    cluster: Cluster, session_id: str, host: Host, event_id: str, at: int | None
) -> Process:
    """One switch, asked for until it is answered, and now and then once more."""
    rng = cluster.world.rng
    for _ in range(TRIES):
        router = rng.choice(cluster.routers)
        prompt = f"switch {event_id}"
        try:
            entry = yield router.request(
                host, partial(router.switch, session_id, event_id, prompt, at)
            )
            cluster.ledger.acknowledged(session_id, entry)
            if rng.random() < 0.05:
                other = partial(router.switch, session_id, event_id, "another", at)
                yield router.request(host, other)
                cluster.ledger.breach(f"{session_id}: {event_id} is accepted with another body")
            if rng.random() < 0.3:
                continue
            return
        except EventIdConflict:
            return
        except (ChunkSealed, SessionClosed):
            raise
        except EchoError:
            yield Sleep(rng.uniform(0.1, 0.5))


def interrupt(cluster: Cluster, record: SessionRecord, host: Host) -> Process:
    """Somebody who pauses the session for a while, and now and then ends it."""
    rng = cluster.world.rng
    yield Sleep(rng.uniform(2, cluster.plan.troubled_s))
    if rng.random() < 0.15:
        yield from change(cluster, record.id, host, SessionState.CLOSED)
        return
    while not cluster.peace:
        yield from change(cluster, record.id, host, SessionState.PAUSED)
        yield Sleep(rng.choice([0.1, 1, 4]) * rng.random())
        yield from change(cluster, record.id, host, SessionState.LIVE)
        yield Sleep(rng.uniform(1, 10))


def change(cluster: Cluster, session_id: str, host: Host, state: SessionState) -> Process:
    """Set a session's state, if anybody answers."""
    rng = cluster.world.rng
    for viewer in cluster.viewers:
        if viewer.session_id == session_id:
            # What is paused on purpose is no stall.
            viewer.playing_s = None
    for _ in range(TRIES):
        router = rng.choice(cluster.routers)
        try:
            yield router.request(host, partial(router.change, session_id, state))
        except SessionClosed:
            return
        except EchoError:
            yield Sleep(rng.uniform(0.1, 0.5))
            continue
        cluster.ledger.counts[f"sessions set {state.value}"] += 1
        return


def wake(cluster: Cluster, record: SessionRecord, host: Host) -> Process:
    """In peace nobody wants a session to stay paused that is watched."""
    book = cluster.ledger.books[record.id]
    while True:
        if book.state is SessionState.PAUSED:
            yield from change(cluster, record.id, host, SessionState.LIVE)
        yield Sleep(1.0)
