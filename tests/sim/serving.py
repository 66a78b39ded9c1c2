"""The replica's end of a pull: committed segments in order, as far as the reader wants, and beats.

A process that dies leaves nothing to tidy up, so nothing here relies on being tidied up.
"""

from __future__ import annotations

from dataclasses import dataclass

from sim.kernel import Process, Rung
from sim.network import Pipe
from sim.replica import Replica
from sim.seat import RETENTION, Reader, Seat

from echo_ray.errors import Draining, EchoError, SegmentExpired
from echo_ray.session.locating import Owner

BEAT_S = 0.4
CLOSED = "closed"
GOING_AWAY = "going away"
BEAT = "beat"


@dataclass(frozen=True, slots=True)
class Line:
    """A pull's connection: segments one way, wants the other."""

    inbox: Pipe
    wants: Pipe


def serve_pull(replica: Replica, owner: Owner, start: int, until: int, line: Line) -> Process:
    """Serve one reader until one side ends it."""
    if replica.id == owner.replica_id:
        try:
            seat = yield from replica.own(owner.session_id, owner.epoch)
        except EchoError as error:
            _refuse(line, error)
        else:
            reader = Reader(owner.epoch, start, until)
            seat.attach(reader)
            try:
                yield from _feed(replica, seat, reader, line)
            except EchoError as error:
                _refuse(line, error)
            seat.detach(reader)
    line.wants.close()
    line.inbox.send(CLOSED)


def _refuse(line: Line, error: EchoError) -> None:
    line.inbox.send(GOING_AWAY if isinstance(error, Draining) else error)


def _feed(replica: Replica, seat: Seat, reader: Reader, line: Line) -> Process:
    """Segments as they are published, until the reader goes or the session does."""
    host, index = replica.host, reader.cursor
    beat_s, greeted = host.monotonic(), False
    while not line.inbox.gone:
        while line.wants.items:
            want = line.wants.items.popleft()
            if want is None:
                return
            if want > reader.want:
                reader.want = want
                seat.wake()
        segment = seat.segment(reader, index)
        if seat.now.planned and not greeted:
            greeted = True
            if index < max(0, seat.now.committed - RETENTION):
                raise SegmentExpired(f"{seat.record.id}: {index} is not kept any more")
        if segment is not None and index < reader.want:
            line.inbox.send(segment)
            index += 1
            continue
        if segment is None and seat.past_wanted() is not None:
            replica.backfill(seat)
        now_s = host.monotonic()
        if now_s - beat_s >= BEAT_S:
            line.inbox.send(BEAT)
            beat_s = now_s
        yield Rung(BEAT_S + beat_s - now_s, seat.bell, line.wants.bell)
