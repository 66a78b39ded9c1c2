"""Fork, rewind, export and import: a session's past taken from the stores, and planted as another.

    take -> Archive -> plant           fork, rewind
    take -> Archive -> file            export
            file -> Archive -> plant   import

The session that is taken from is only read, whatever it does meanwhile. Blobs are copied before the
new session exists for anybody; what fails in between leaves blobs that nothing names, and the sweep
deletes those. All of it happens on threads, a few at a time. Knows nothing about HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from echo_ray import wire
from echo_ray.errors import (
    ArchiveCorrupt,
    CapacityError,
    ClipLost,
    EchoError,
    SessionNotFound,
    SnapshotError,
    SnapshotNotFound,
    StoreCorrupt,
    StoreUnavailable,
)
from echo_ray.serve.front import Front
from echo_ray.serve.telemetry import log
from echo_ray.session import archive as archives
from echo_ray.session import forking, rules
from echo_ray.session import snapshot as codec
from echo_ray.session.access import Quota
from echo_ray.session.archive import Archive
from echo_ray.session.control_log import DIGESTS_KEPT
from echo_ray.session.forking import Past, Wish
from echo_ray.session.records import (
    ControlEntry,
    OnIdle,
    SessionRecord,
    SessionState,
    SnapshotRef,
)

COPIES_AT_ONCE = 2
"""Sessions whose blobs are in this router's memory to be copied; the next one waits."""
CLOSE_TRIES = 3
CLOSE_PAUSE_S = 0.2


class Forks:
    """A router's actions that make one session out of another; one per router."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._turn = asyncio.Semaphore(COPIES_AT_ONCE)
        config = front.config
        self._limit_chunks = 2 * config.session.retention_chunks + front.shape.point_every
        """As far as a replica replays for the sake of a past segment."""
        limits = config.limits
        entry_bytes = 4 * (limits.prompt_chars + rules.EVENT_ID_CHARS) + 32
        self.limit_bytes = (
            config.storage.snapshot_limit_bytes
            + limits.clip_bytes
            + limits.events_per_session * entry_bytes
            + 2**20
        )
        """The largest archive that is taken in."""

    async def fork(
        self, session_id: str, chunk: int | None, wish: Wish, prompt: str | None = None
    ) -> SessionRecord:
        """A new session that begins at `chunk` (None: the next one), with `prompt` from there on.

        Raises `SegmentBeyondEnd`, `ChunkUnreachable`, `ClipLost`, and what refuses a new session.
        """
        front = self._front
        if prompt is not None:
            rules.check_prompt(prompt, front.config.limits)
        if wish.labels is not None:
            rules.check_labels(wish.labels, front.config.limits)
        source = await front.get(session_id)
        at = forking.check_chunk(source, chunk)
        made = forking.forked(source, at, new_id=front.new_id(), now=front.clock.wall(), wish=wish)
        await front.admit(made)
        await self._copy(source, made, prompt, front.quota(made))
        await self._begin(made)
        log(logging.INFO, "forked", session=made.id, source=source.id, chunk=at)
        return made

    async def rewind(self, session_id: str, chunk: int) -> SessionRecord:
        """A fork at `chunk` that takes the session's place; the old one is closed.

        Raises as `fork`, and `StoreUnavailable` if the successor is there but the old session
        could not be closed.
        """
        front = self._front
        source = await front.get(session_id)
        at = forking.check_chunk(source, chunk)
        made = forking.forked(
            source, at, new_id=front.new_id(), now=front.clock.wall(), wish=Wish()
        )
        if source.state is SessionState.PAUSED:
            made = replace(made, state=SessionState.PAUSED)
        quota = front.quota(made)
        if source.state is SessionState.CLOSED:
            # Any other gives its own place up.
            await front.admit(made)
        elif quota is not None:
            quota = quota.instead()
        await self._copy(source, made, None, quota)
        # Before it is closed: else they might hear of that alone.
        front.relays.finish(source.id, wire.Done(reason="rewound", successor=made.id))
        await self._close(source, made)
        await self._begin(made)
        log(logging.INFO, "rewound", session=made.id, source=source.id, chunk=at)
        return made

    async def export(self, session_id: str) -> tuple[int, Iterator[bytes]]:
        """The size and the pieces of a session's archive, as it stands at its next chunk.

        Making a piece takes time on a processor: do it on a thread. Raises `ChunkUnreachable`,
        `ClipLost`.
        """
        source = await self._front.get(session_id)
        async with self._turn:
            taken = await asyncio.to_thread(self._take, source, source.next_index)
        upcoming = await asyncio.to_thread(
            self._front.directory.controls, source.id, source.next_index
        )
        whole = replace(taken, controls=[*taken.controls, *upcoming])
        return archives.pieces(whole)

    async def import_(self, data: bytes, tenant: str = "") -> SessionRecord:
        """A new session of `tenant` that goes on where the archive ends, whosever it was.

        Raises `ArchiveError` and its kinds, `ModelUnknown`, `SnapshotError` and its kinds,
        `ClipInvalid`, `ClipTooLarge`, and what refuses a new session.
        """
        front = self._front
        async with self._turn:
            archive = await asyncio.to_thread(self._read, data)
        archive = replace(archive, record=replace(archive.record, tenant=tenant))
        made = archive.record
        await self._check_runs_here(archive)
        await front.admit(made)
        try:
            if archive.clip is not None:
                # A stranger's file: it is read as carefully as an upload.
                taken = await front.clips.take(made.id, archive.clip)
                if taken != made.clip:
                    raise ArchiveCorrupt(
                        f"the archive's clip gives {taken.frames} frames here, and its session "
                        f"began with {made.clip and made.clip.frames}; export it again",
                        param="clip",
                    )
            async with self._turn:
                plain = replace(archive, clip=None)
                await asyncio.to_thread(self._plant, plain, front.quota(made))
        except EchoError:
            await asyncio.to_thread(self._uproot, made.id)
            raise
        await self._begin(made)
        log(logging.INFO, "imported", session=made.id, chunk=made.next_index)
        return made

    # Taking

    def _take(self, source: SessionRecord, chunk: int) -> Archive:
        """What a session that begins at `chunk` of this one needs; blocks."""
        directory, store = self._front.directory, self._front.snapshots
        refs = directory.snapshots(source.id)
        point, snapshot = self._point(source, refs, chunk)
        clip = None
        if source.clip is not None:
            try:
                clip = store.get(source.id, source.clip.id)
                if hashlib.sha256(clip).hexdigest() != source.clip.sha256:
                    raise StoreCorrupt(f"clip {source.clip.id!r} is not what was uploaded")
            except (SnapshotNotFound, StoreCorrupt) as error:
                clip = None
                if snapshot is None:
                    raise ClipLost(
                        f"session {source.id!r} begins with a clip that cannot be read any more: "
                        f"{error.message}; begin at a later chunk or restore the store",
                        param="chunk",
                    ) from error
        entries = [e for e in directory.controls(source.id) if e.chunk < chunk]
        return Archive(
            record=source,
            controls=entries,
            digests=directory.digests(source.id, max(0, chunk - DIGESTS_KEPT), chunk),
            point=point,
            snapshot=snapshot,
            clip=clip,
        )

    def _point(
        self, source: SessionRecord, refs: Sequence[SnapshotRef], chunk: int
    ) -> tuple[int, bytes | None]:
        """The best point that can be read, and its snapshot; 0 and None: the session's start."""
        unreadable: set[str] = set()
        for ref in forking.starts(refs, chunk=chunk, limit=self._limit_chunks):
            if ref is None:
                return 0, None
            try:
                return ref.chunk_index, self._usable(source, ref)
            except (SnapshotError, SnapshotNotFound, StoreCorrupt) as error:
                unreadable.add(ref.id)
                log(
                    logging.WARNING,
                    "snapshot_unreadable",
                    session=source.id,
                    snapshot=ref.id,
                    error=error.message,
                )
        left = [ref for ref in refs if ref.id not in unreadable]
        raise forking.unreachable(source, chunk, left, limit=self._limit_chunks)

    def _usable(self, source: SessionRecord, ref: SnapshotRef) -> bytes:
        blob = self._front.snapshots.get(source.id, ref.id)
        found = codec.decode(blob, limit_bytes=self._front.config.storage.snapshot_limit_bytes)
        # One of an older release would be refused by the engine that made the last chunk.
        if source.fingerprint is not None:
            forking.check_fingerprint(found.fingerprint, [source.fingerprint])
        return blob

    def _read(self, data: bytes) -> Archive:
        """The archive as the session that it is to become here; blocks."""
        config = self._front.config
        archive = archives.decode(data, limit_bytes=self.limit_bytes)
        theirs, limits = archive.record, config.limits
        fresh = rules.new_session(
            new_id=self._front.new_id(),
            prompt=theirs.prompt,
            seed=theirs.seed,
            model=theirs.model,
            served_model=self._front.shape.model,
            pace=theirs.pace.value,
            on_idle=theirs.on_idle.value,
            labels=theirs.labels,
            limits=limits,
            now=self._front.clock.wall(),
        )
        if len(archive.controls) > limits.events_per_session:
            raise CapacityError(
                f"the archive has {len(archive.controls)} events; at most "
                f"{limits.events_per_session} (limits.events_per_session)"
            )
        for entry in archive.controls:
            rules.check_event_id(entry.event_id)
            rules.check_prompt(entry.prompt, limits, param="controls")
        if archive.snapshot is not None:
            limit = config.storage.snapshot_limit_bytes
            codec.decode(archive.snapshot, limit_bytes=limit)
        elif theirs.clip is not None and archive.clip is None:
            raise ArchiveCorrupt("the archive has neither a snapshot nor the clip of its session")
        record = replace(
            fresh,
            state=SessionState.PAUSED if theirs.state is SessionState.PAUSED else fresh.state,
            next_index=theirs.next_index,
            sealed=theirs.next_index,
            fingerprint=theirs.fingerprint,
            clip=theirs.clip,
        )
        return replace(archive, record=record)

    async def _check_runs_here(self, archive: Archive) -> None:
        """Refuse what the engines here would."""
        replicas = await asyncio.to_thread(self._front.directory.replicas)
        running = [r.fingerprint for r in replicas if r.model == archive.record.model]
        forking.check_fingerprint(archive.record.fingerprint, list(filter(None, running)))

    # Planting

    async def _copy(
        self, source: SessionRecord, made: SessionRecord, prompt: str | None, quota: Quota | None
    ) -> None:
        """Plant the source's past before `made.next_index` as `made`."""
        async with self._turn:
            taken = await asyncio.to_thread(self._take, source, made.next_index)
            planted = replace(taken, record=made)
            if prompt is not None:
                switch = ControlEntry(
                    event_id=f"fork-{made.id}", chunk=made.next_index, prompt=prompt
                )
                planted = replace(planted, controls=[*planted.controls, switch])
            try:
                await asyncio.to_thread(self._plant, planted, quota)
            except EchoError:
                await asyncio.to_thread(self._uproot, made.id)
                raise

    def _plant(self, archive: Archive, quota: Quota | None) -> None:
        """Store the blobs, durably, and then create the session; blocks."""
        store, record = self._front.snapshots, archive.record
        snapshots = []
        if archive.snapshot is not None:
            ref = SnapshotRef(
                id=f"p{archive.point:010d}-e{record.epoch}",
                session_id=record.id,
                chunk_index=archive.point,
                size_bytes=len(archive.snapshot),
                digest=hashlib.sha256(archive.snapshot).hexdigest(),
                created_at=record.created_at,
                store=store.name,
                epoch=record.epoch,
            )
            store.put(record.id, ref.id, archive.snapshot)
            store.make_durable(record.id, ref.id)
            snapshots.append(ref)
        if archive.clip is not None and record.clip is not None:
            store.put(record.id, record.clip.id, archive.clip)
            store.make_durable(record.id, record.clip.id)
        self._front.directory.restore(
            Past(
                record=record,
                controls=archive.controls,
                digests=archive.digests,
                snapshots=snapshots,
            ),
            quota=quota,
        )

    def _uproot(self, session_id: str) -> None:
        """Delete what there is of a session that could not be created; the sweep does the rest."""
        with contextlib.suppress(EchoError):
            # A store that did not answer may have made it, and then it must not lose its blobs.
            with contextlib.suppress(SessionNotFound):
                self._front.directory.delete(session_id)
            self._front.snapshots.delete_session(session_id)

    async def _begin(self, record: SessionRecord) -> None:
        """Let somebody generate the session at once if it is to run without viewers."""
        if record.on_idle is not OnIdle.CONTINUE or record.state is not SessionState.LIVE:
            return
        try:
            await self._front.adopt(record.id)
        except EchoError as error:
            # It is there all the same, and begins when somebody watches it.
            log(logging.WARNING, "not_adopted", session=record.id, error=error.message)

    async def _close(self, source: SessionRecord, successor: SessionRecord) -> None:
        for _ in range(CLOSE_TRIES - 1):
            with contextlib.suppress(StoreUnavailable):
                await self._front.stop(source.id)
                return
            await asyncio.sleep(CLOSE_PAUSE_S)
        try:
            await self._front.stop(source.id)
        except StoreUnavailable as error:
            raise StoreUnavailable(
                f"session {successor.id} is there from chunk {successor.next_index} on, but "
                f"{source.id} could not be closed: {error.message}; delete one of them",
                retry_after_s=error.retry_after_s,
            ) from error
