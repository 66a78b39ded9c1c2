"""Archives at the door: what an import refuses, and what moving large files leaves alone."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from forking_rig import ARCHIVE, BINARY, BLOB, LIMIT, file_of, imported, only, planted, refusal
from router_rig import CONFIG, Rig, eventually, run
from uploads import still
from uvicorn.config import HTTP_PROTOCOLS

from echo_ray.config import StorageSection
from echo_ray.serve import archive_body
from echo_ray.session.archive import Archive, decode
from echo_ray.session.records import ClipRef, ControlEntry
from echo_ray.session.snapshot import Snapshot
from echo_ray.session.snapshot import encode as encode_snapshot
from echo_ray.storage.memory import MemorySnapshots
from echo_ray.storage.tiered import TieredSnapshots


@pytest.mark.parametrize(
    ("archive", "code", "word"),
    [
        (replace(ARCHIVE, record=replace(ARCHIVE.record, model="other")), "model_unknown", "fake"),
        (replace(ARCHIVE, record=replace(ARCHIVE.record, prompt="")), "prompt_invalid", "empty"),
        (
            replace(ARCHIVE, record=replace(ARCHIVE.record, prompt="x" * 101)),
            "prompt_invalid",
            "100",
        ),
        (replace(ARCHIVE, record=replace(ARCHIVE.record, seed=-1)), "invalid_request", "seed"),
        (
            replace(ARCHIVE, record=replace(ARCHIVE.record, labels={"": ""})),
            "invalid_request",
            "labels",
        ),
        (
            replace(ARCHIVE, controls=[ControlEntry(event_id="", chunk=1, prompt="p")]),
            "invalid_request",
            "event_id",
        ),
        (
            replace(ARCHIVE, controls=[ControlEntry(event_id="e", chunk=1, prompt="")]),
            "prompt_invalid",
            "controls",
        ),
        (
            replace(ARCHIVE, controls=[ControlEntry(event_id="e", chunk=1, prompt="p")] * 2),
            "invalid_request",
            "twice",
        ),
        (replace(ARCHIVE, snapshot=BLOB[:-1]), "snapshot_truncated", "ends early"),
        (replace(ARCHIVE, snapshot=b"nothing"), "snapshot_foreign", "magic"),
    ],
)
def test_archives_that_hold_what_cannot_be(archive: Archive, code: str, word: str) -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        refusal(await imported(rig, file_of(archive)), 400, code, word)
        assert only(rig)

    run(test)


def test_files_that_are_no_whole_archive() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        data = file_of(ARCHIVE)
        newer = data.replace(b"\xa6format\x01", b"\xa6format\x02")
        newer = newer[:-32] + hashlib.sha256(newer[: -32 - 9]).digest()
        for body, code in (
            (b"", "archive_truncated"),
            (b"PK" * 50, "archive_foreign"),
            (BLOB, "archive_foreign"),
            (data[:-1], "archive_truncated"),
            (data[:50] + b"x" + data[51:], "archive_corrupt"),
            (newer, "archive_version"),
        ):
            refusal(await imported(rig, body), 400, code)
        answer = await imported(rig, data, headers={"Content-Type": "text/plain"})
        refusal(answer, 400, "invalid_request", "application/octet-stream")
        answer = await rig.http.get(rig.url("/v1/sessions/import"))
        refusal(answer, 404, "session_not_found")
        assert only(rig)

    run(test)


def test_too_many_events_for_this_service() -> None:
    few = replace(CONFIG, limits=replace(CONFIG.limits, events_per_session=1))
    events = [ControlEntry(event_id=f"e{n}", chunk=n, prompt="p") for n in range(2)]

    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        data = file_of(replace(ARCHIVE, controls=events))
        refusal(await imported(rig, data), 429, "capacity_exhausted", "events_per_session")

    run(test, few)


@pytest.mark.parametrize("parser", ["h11_impl:H11Protocol", "httptools_impl:HttpToolsProtocol"])
def test_over_the_limit(monkeypatch: pytest.MonkeyPatch, parser: str) -> None:
    # Whichever is installed: it goes on reading after its answer.
    monkeypatch.setitem(HTTP_PROTOCOLS, "auto", f"uvicorn.protocols.http.{parser}")
    small = replace(
        CONFIG,
        storage=StorageSection(snapshot_limit_bytes=2048),
        limits=replace(CONFIG.limits, clip_bytes=2048, events_per_session=1),
    )

    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        big = file_of(replace(ARCHIVE, snapshot=bytes(3 * 2**20)))
        refusal(await imported(rig, big), 413, "archive_too_large", "storage.snapshot_limit_bytes")
        assert b"archive_too_large" in await sent_to_the_end(rig, 40 * 2**20)
        # Below the limit of the file, and over that of a snapshot.
        some = file_of(replace(ARCHIVE, snapshot=bytes(4096)))
        refusal(await imported(rig, some), 400, "snapshot_invalid", "2048")
        assert only(rig)

    run(test, small)


async def sent_to_the_end(rig: Rig, size: int) -> bytes:
    """The answer to a client that sends its whole body before it listens."""
    host, _, port = rig.routers[0].address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    lines = ("POST /v1/sessions/import HTTP/1.1", "Host: x", f"Content-Length: {size}", "\r\n")
    head = "\r\n".join((*lines[:3], f"Content-Type: {BINARY['Content-Type']}", *lines[3:]))
    writer.write(head.encode())
    for _ in range(size // 2**20):
        writer.write(bytes(2**20))
        await writer.drain()
    answer = await asyncio.wait_for(reader.readuntil(b"}}"), 10)
    writer.close()
    return answer


def test_a_strangers_clip_is_read_as_an_upload() -> None:
    data = still("PNG", 4, 4)
    clip = ClipRef(id="clip-1", sha256=hashlib.sha256(data).hexdigest(), frames=1)

    def with_clip(clip: ClipRef, data: bytes | None, **changes: Any) -> bytes:
        record = replace(ARCHIVE.record, clip=clip)
        return file_of(replace(ARCHIVE, record=record, clip=data, **changes))

    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        text = b"no picture at all"
        fake = ClipRef(id="c", sha256=hashlib.sha256(text).hexdigest(), frames=1)
        refusal(await imported(rig, with_clip(fake, text)), 400, "clip_invalid")
        answer = await imported(rig, with_clip(clip, data))
        refusal(answer, 400, "archive_corrupt", "clip")
        good = replace(clip, id=f"clip-{clip.sha256[:16]}")
        longer = replace(good, frames=99)
        refusal(await imported(rig, with_clip(longer, data)), 400, "archive_corrupt", "99")
        answer = await imported(rig, with_clip(good, None, point=0, snapshot=None))
        refusal(answer, 400, "archive_corrupt", "neither")
        assert only(rig)
        answer = await imported(rig, with_clip(good, data))
        assert answer.json()["clip_frames"] == 1
        assert rig.snapshots.get(answer.json()["id"], good.id) == data

    run(test)


def test_archives_on_their_way_are_counted_and_slow_ones_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = file_of(ARCHIVE)
    counts = {"enter": 0, "leave": 0}

    def count(verb: str) -> None:
        plain = getattr(archive_body.Transfers, verb)

        def counted(transfers: archive_body.Transfers) -> None:
            plain(transfers)
            counts[verb] += 1

        monkeypatch.setattr(archive_body.Transfers, verb, counted)

    for verb in counts:
        count(verb)

    async def slow() -> AsyncIterator[bytes]:
        """Its second half comes when somebody has been given up."""
        before = counts["leave"]
        yield data[:10]
        await eventually(lambda: counts["leave"] > before)
        yield data[10:]

    def begun(rig: Rig) -> asyncio.Task[httpx.Response]:
        return asyncio.create_task(imported(rig, slow()))  # type: ignore[arg-type]

    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        planted(rig)
        waiting = [begun(rig) for _ in range(archive_body.ARCHIVES_AT_ONCE)]
        await eventually(lambda: counts["enter"] == archive_body.ARCHIVES_AT_ONCE)
        answer = await imported(rig, data)
        refusal(answer, 429, "capacity_exhausted", "archives are on their way")
        assert answer.headers["Retry-After"]
        answer = await rig.call("GET", "/v1/sessions/s1/export")
        refusal(answer, 429, "capacity_exhausted")
        for upload in waiting:
            upload.cancel()
        await eventually(lambda: counts["leave"] == archive_body.ARCHIVES_AT_ONCE)
        with monkeypatch.context() as patch:
            patch.setattr(archive_body, "TRANSFER_S", 1.0)
            late = await begun(rig)
            refusal(late, 400, "invalid_request", "did not arrive within 1 s")
        assert (await imported(rig, data)).status_code == 201

    run(test)


def test_what_is_answered_is_durable() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        hot, durable = rig.snapshots, MemorySnapshots()
        rig.snapshots = TieredSnapshots(hot, durable, durable_every=1000)  # type: ignore[assignment]
        rig.router()
        planted(rig)
        data = still("PNG", 4, 4)
        sha256 = hashlib.sha256(data).hexdigest()
        clip = ClipRef(id=f"clip-{sha256[:16]}", sha256=sha256, frames=1)
        whole = replace(ARCHIVE, record=replace(ARCHIVE.record, clip=clip), clip=data)
        first = (await imported(rig, file_of(whole))).json()["id"]
        second = (await rig.call("POST", f"/v1/sessions/{first}/fork", {})).json()["id"]
        third = (await rig.call("POST", f"/v1/sessions/{second}/rewind", {"chunk": 25})).json()[
            "id"
        ]
        for sid in (first, second, third):
            (kept,) = rig.directory.snapshots(sid)
            assert kept.store == rig.snapshots.name
            assert durable.get(sid, kept.id) == BLOB
            assert durable.get(sid, clip.id) == data

    run(test)


def test_places_are_given_back_whatever_becomes_of_a_client() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        planted(rig)
        for _ in range(archive_body.ARCHIVES_AT_ONCE + 1):
            async with rig.http.stream("GET", rig.url("/v1/sessions/s1/export")) as answer:
                assert answer.headers["content-disposition"] == 'attachment; filename="s1.echo"'
            refusal(await rig.call("GET", "/v1/sessions/ghost/export"), 404, "session_not_found")
            refusal(await imported(rig, b"x"), 400, "archive_foreign")
        answer = await rig.call("GET", "/v1/sessions/s1/export")
        archive = decode(answer.content, limit_bytes=LIMIT)
        assert (archive.record.id, archive.point, archive.snapshot) == ("s1", 24, BLOB)

    run(test)


def test_the_routes_that_only_answer_stay_quick_while_archives_move() -> None:
    big = encode_snapshot(Snapshot("fake/1/cpu", {"x": [bytes(2**20)] * 40}, {}))

    async def test(rig: Rig) -> None:
        rig.snapshots._limit_bytes = 2**27
        rig.replica("a")
        rig.router()
        planted(rig)
        rig.snapshots.put("s1", "p24", big)
        over = asyncio.Event()
        worst = 0.0

        async def beat() -> None:
            nonlocal worst
            while not over.is_set():
                # Of this thread alone: what other threads and processes do is not counted.
                before = time.thread_time()
                await asyncio.sleep(0.01)
                worst = max(worst, time.thread_time() - before)

        beating = asyncio.create_task(beat())
        whole = await rig.call("GET", "/v1/sessions/s1/export")
        made = await rig.call("POST", "/v1/sessions/s1/fork", {})
        over.set()
        await beating
        assert decode(whole.content, limit_bytes=LIMIT).snapshot == big
        await eventually(lambda: rig.snapshots.get(made.json()["id"], "p0000000024-e0") == big)
        # Server and client share this loop, and both handle 40 MB in pieces.
        assert worst < 0.5

    run(test)
