"""Committed segments kept in memory: chunks, their metadata, and encoded forms made when asked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from echo_ray.errors import SegmentBeyondEnd, SegmentExpired
from echo_ray.session.chunk import Chunk
from echo_ray.session.replay import EventMarks

Encode = Callable[[Chunk, str, int], bytes]
"""(chunk, format, index of its first frame in the stream) -> bytes of the segment."""


@dataclass(slots=True)
class Segment:
    """One chunk that readers may have."""

    chunk: Chunk
    marks: EventMarks
    start_frame: int
    start_s: float
    chunk_seconds: float
    discontinuity: bool = False
    _encoded: dict[str, bytes] = field(default_factory=dict)
    _encoding: threading.Lock = field(default_factory=threading.Lock)

    def encoded(self, fmt: str, encode: Encode) -> bytes:
        """The segment in format `fmt`; made once, by the thread that asks first."""
        with self._encoding:
            blob = self._encoded.get(fmt)
            if blob is None:
                blob = self._encoded[fmt] = encode(self.chunk, fmt, self.start_frame)
            return blob

    def metadata(self, *, byte_length: int, epoch: int, owner: str) -> dict[str, Any]:
        """The `video.chunk_metadata` message that goes before the segment's bytes."""
        drift = self.chunk.drift
        return {
            "type": "video.chunk_metadata",
            "chunk_index": self.chunk.index,
            "num_frames": self.chunk.num_frames,
            "pts_ms": round(self.start_s * 1000),
            "byte_length": byte_length,
            "digest": self.chunk.digest,
            "epoch": epoch,
            "prompt": self.chunk.prompt,
            "ignored_words": list(self.chunk.ignored_words),
            "started_event_ids": list(self.marks.started),
            "active_event_ids": list(self.marks.active),
            "completed_event_ids": list(self.marks.completed),
            "discontinuity": self.discontinuity,
            "drift": {"score": drift.score, "flags": list(drift.flags)},
            "owner": owner,
            "chunk_seconds": self.chunk_seconds,
        }


class SegmentRing:
    """The newest segments of one session, by consecutive index. Not thread-safe."""

    def __init__(self, retention: int) -> None:
        self._retention = retention
        self._segments: dict[int, Segment] = {}
        self._first = 0
        self._next = 0

    @property
    def first(self) -> int:
        """The oldest index that is kept, or that comes next while the ring is empty."""
        return self._first

    @property
    def next(self) -> int:
        """One past the newest index."""
        return self._next

    def restart(self, index: int) -> None:
        """Expect segments from `index` on; those that are kept and follow without a gap stay."""
        if not self._first <= index <= self._next:
            self._segments.clear()
            self._first = self._next = index

    def kept(self, index: int) -> Segment | None:
        return self._segments.get(index)

    def put(self, segment: Segment) -> None:
        """Add the segment that comes next; one that is kept already is not replaced."""
        index = segment.chunk.index
        if index in self._segments or index < self._first:
            return
        if index != self._next:
            self.restart(index)
        self._segments[index] = segment
        self._next = index + 1
        while len(self._segments) > self._retention:
            del self._segments[self._first]
            self._first += 1

    def get(self, index: int) -> Segment:
        """Raises `SegmentExpired` or `SegmentBeyondEnd`."""
        segment = self._segments.get(index)
        if segment is not None:
            return segment
        if index < self._first:
            raise SegmentExpired(
                f"segment {index} is not kept any more; the oldest is {self._first}",
                param="chunk_index",
            )
        raise SegmentBeyondEnd(
            f"segment {index} does not exist yet; the next one is {self._next}",
            param="chunk_index",
        )
