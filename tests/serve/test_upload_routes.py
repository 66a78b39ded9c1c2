"""Creating a session with a clip, at the router's door."""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from router_rig import CONFIG, Rig, eventually, run
from uploads import memory_bomb, mp4, sound, still

from echo_ray.client import EchoClient
from echo_ray.errors import ClipInvalid, ClipLost, ClipTooLarge, StoreUnavailable
from echo_ray.serve import body_limit

WISH = json.dumps({"prompt": "the ball rolls on", "seed": 7, "pace": "max"})
CLIP = mp4(32)
SMALL = replace(CONFIG, limits=replace(CONFIG.limits, clip_bytes=20_000))
Part = tuple[str, tuple[str | None, str | bytes]]


def parts(*more: Part, wish: str | None = WISH, clip: bytes | None = CLIP) -> list[Part]:
    whole: list[Part] = []
    if wish is not None:
        whole.append(("session", (None, wish)))
    if clip is not None:
        whole.append(("clip", ("clip.mp4", clip)))
    return [*whole, *more]


async def upload(rig: Rig, files: list[Part], **more: Any) -> httpx.Response:
    return await rig.http.post(rig.url("/v1/sessions"), files=files, **more)


def refusal(answer: httpx.Response, status: int, code: str, *words: str) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    assert all(word in error["message"] for word in words), error


def nothing_is_left(rig: Rig) -> bool:
    return not rig.directory.list() and not any(rig.snapshots._blobs.values())


def test_a_session_with_a_clip_is_created_shown_and_deleted() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        answer = await upload(rig, parts())
        assert answer.status_code == 201, answer.text
        view = answer.json()
        # 32 pictures: one frame in the first chunk, two in every other.
        assert view["clip_frames"] == 31
        assert (view["prompt"], view["seed"], view["pace"]) == ("the ball rolls on", 7, "max")
        sid = view["id"]
        assert (await rig.call("GET", f"/v1/sessions/{sid}")).json() == view
        clip = rig.directory.get(sid).clip
        assert clip is not None
        digest = hashlib.sha256(CLIP).hexdigest()
        assert (clip.id, clip.sha256, clip.frames) == (f"clip-{digest[:16]}", digest, 31)
        assert rig.snapshots.get(sid, clip.id) == CLIP
        assert (await rig.call("GET", f"/v1/sessions/{sid}/snapshots")).json() == {"snapshots": []}
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(2)
            assert viewer.messages[0]["session"]["clip_frames"] == 31
        await rig.call("DELETE", f"/v1/sessions/{sid}")
        assert nothing_is_left(rig)
        without = (await rig.call("POST", "/v1/sessions", {"prompt": "red"})).json()
        assert without["clip_frames"] == 0

    run(test)


def test_the_session_may_be_a_file_too_and_the_clip_a_picture() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        more: list[Part] = [("session", ("session.json", WISH)), ("clip", ("a.png", still()))]
        answer = await upload(rig, more)
        assert (answer.status_code, answer.json()["clip_frames"]) == (201, 1)

    run(test)


def test_bad_forms_are_refused_and_leave_nothing() -> None:
    cases: list[tuple[list[Part], str, str]] = [
        (parts(wish=None), "invalid_request", "no part session"),
        (parts(("clip", ("two.mp4", CLIP))), "invalid_request", "clip is there 2 times"),
        (parts(("session", (None, WISH))), "invalid_request", "session is there 2 times"),
        (parts(("film", ("film.mp4", CLIP))), "invalid_request", "part film is unknown"),
        (parts(("x" * 300, (None, "y"))), "invalid_request", "is unknown"),
        ([*parts(clip=None), ("clip", (None, "text"))], "invalid_request", "as a file part"),
        (parts(wish="{"), "invalid_request", "not JSON"),
        (parts(wish="[]"), "invalid_request", "body"),
        (parts(wish='{"prompt": ""}'), "prompt_invalid", "empty"),
        (parts(wish='{"prompt": "red", "sed": 1}'), "invalid_request", "sed is unknown"),
        (parts(wish='{"prompt": "red", "seed": "1"}'), "invalid_request", "seed"),
        (parts(clip=b""), "clip_invalid", "clip is empty"),
        (parts(clip=b"#EXTM3U\nfile:///etc/passwd\n"), "clip_invalid", "is not an MP4"),
        (parts(clip=CLIP[:500]), "clip_invalid", "cannot be read"),
        (parts(clip=sound()), "clip_invalid", "no video track"),
        (parts(clip=memory_bomb()), "clip_invalid", "cannot be read"),
    ]

    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        for files, code, words in cases:
            refusal(await upload(rig, files), 400, code, words)
        assert nothing_is_left(rig)

    run(test)


def test_bodies_that_are_no_forms_are_refused() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        form = "multipart/form-data"
        for kind, body in (
            (form, b"abc"),
            (f"{form}; boundary=x", b"abc"),
            (f"{form}; boundary=x", b'--x\r\nContent-Disposition: form-data; name="session"'),
            (f"{form}; boundary=x", b"--x\r\n\r\nno name\r\n--x--\r\n"),
            (f"{form}; boundary=x", b""),
            ("text/plain", WISH.encode()),
            ("application/x-www-form-urlencoded", b"session=1"),
            ("", WISH.encode()),
        ):
            headers = {"content-type": kind}
            answer = await rig.http.post(rig.url("/v1/sessions"), content=body, headers=headers)
            refusal(answer, 400, "invalid_request")
        cross = await upload(rig, parts(), headers={"sec-fetch-site": "cross-site"})
        refusal(cross, 400, "invalid_request", "another site")
        assert nothing_is_left(rig)

    run(test)


def test_only_a_new_sessions_form_may_be_large_and_it_has_its_limit() -> None:
    big = bytes(30_000)

    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        fits = parts(clip=bytes(20_001))
        refusal(await upload(rig, fits), 413, "clip_too_large", "20001", "limits.clip_bytes")
        refusal(await upload(rig, parts(clip=big)), 413, "clip_too_large", "limits.clip_bytes")
        picture = still()
        sides = parts(clip=picture[:16] + struct.pack(">II", 5000, 4000) + picture[24:])
        refusal(await upload(rig, sides), 413, "clip_too_large", "5000 x 4000", "clip_side")
        # Anything else keeps the small limit, forms sent elsewhere included.
        as_json = {"content-type": "application/json"}
        to = rig.url("/v1/sessions")
        answer = await rig.http.post(to, content=big, headers=as_json)
        refusal(answer, 413, "message_too_large", "4096", "http.max_message_bytes")
        sid = await rig.create()
        for path in (f"/v1/sessions/{sid}/events", f"/v1/sessions/{sid}/pause", "/v1/sessions/"):
            answer = await rig.http.post(rig.url(path), files=parts(clip=big))
            refusal(answer, 413, "message_too_large", "4096")

    run(test, SMALL)


def test_a_very_large_upload_hears_why_it_is_refused() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        answer = await upload(rig, parts(clip=bytes(32 * 2**20)))
        refusal(answer, 413, "clip_too_large")

    run(test, SMALL)


def test_a_clip_whose_session_cannot_be_created_is_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()

        def fail(record: object, **_: object) -> None:
            assert any(rig.snapshots._blobs.values())
            raise StoreUnavailable("the database is locked")

        monkeypatch.setattr(rig.directory, "create", fail)
        refusal(await upload(rig, parts()), 503, "store_unavailable")
        assert nothing_is_left(rig)

    run(test)


def test_a_clip_is_not_read_where_no_replica_would_take_the_session() -> None:
    async def test(rig: Rig) -> None:
        rig.router()
        refusal(await upload(rig, parts(clip=b"junk")), 503, "no_replica")
        assert nothing_is_left(rig)

    run(test)


def test_a_store_that_cannot_keep_the_clip_creates_no_session() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.snapshots._limit_bytes = 100
        rig.router()
        refusal(await upload(rig, parts()), 429, "capacity_exhausted", "snapshot_limit_bytes")
        assert nothing_is_left(rig)

    run(test)


def test_so_many_clips_at_a_time_and_none_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limit, "UPLOADS_AT_ONCE", 2)
    monkeypatch.setattr(body_limit, "DISCARD_S", 0.2)
    begun: list[int] = []
    clip = body_limit.BodyLimit._clip

    async def noted(limit: body_limit.BodyLimit, body: Any) -> list[bytes]:
        begun.append(1)
        return await clip(limit, body)

    monkeypatch.setattr(body_limit.BodyLimit, "_clip", noted)

    async def slow(rig: Rig) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """An upload that has begun and never ends."""
        count = len(begun)
        host, port = rig.routers[0].address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        )
        await eventually(lambda: len(begun) > count)
        return reader, writer

    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        _, first = await slow(rig)
        with monkeypatch.context() as patch:
            patch.setattr(body_limit, "UPLOAD_S", 1.0)
            reader, writer = await slow(rig)
        said = await reader.read()
        assert said.startswith(b"HTTP/1.1 400 ")
        assert b"did not arrive" in said
        writer.close()
        _, second = await slow(rig)
        answer = await upload(rig, parts(clip=b"junk"))
        refusal(answer, 429, "capacity_exhausted", "2 clips")
        assert int(answer.headers["retry-after"]) >= 1
        for writer in (first, second):
            writer.close()
        while (answer := await upload(rig, parts(clip=b"junk"))).status_code == 429:
            # The service has not noticed yet that both have left.
            pass
        refusal(answer, 400, "clip_invalid")

    run(test)


def test_a_viewer_is_told_of_a_lost_clip_and_not_kept_waiting() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a").refuse = ClipLost("the clip is gone")
        rig.router()
        sid = (await upload(rig, parts())).json()["id"]
        async with rig.watch(sid, "&from=0") as viewer:
            assert (await viewer.until_type("error"))["code"] == "clip_lost"
            assert await viewer.until_closed() == 1008

    run(test)


def test_openapi_shows_both_kinds_of_body() -> None:
    async def test(rig: Rig) -> None:
        rig.router()
        paths = (await rig.call("GET", "/openapi.json")).json()["paths"]
        content = paths["/v1/sessions"]["post"]["requestBody"]["content"]
        assert set(content) == {"application/json", "multipart/form-data"}
        form = content["multipart/form-data"]["schema"]["properties"]
        assert set(form) == {"session", "clip"}
        for schema in (content["application/json"]["schema"], form["session"]):
            assert set(schema["properties"]) == {
                "prompt",
                "seed",
                "model",
                "pace",
                "on_idle",
                "labels",
            }
            assert schema["required"] == ["prompt"]

    run(test)


def test_the_client_sends_clips(tmp_path: Path) -> None:
    file = tmp_path / "ball.mp4"
    file.write_bytes(CLIP)

    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        async with EchoClient(rig.url("")) as client:
            for clip in (CLIP, file):
                session = await client.create("red", seed=7, labels={"a": "b"}, clip=clip)
                assert session["clip_frames"] == 31
                assert (session["seed"], session["labels"]) == (7, {"a": "b"})
            with pytest.raises(ClipInvalid, match="not an MP4"):
                await client.create("red", clip=b"text")
            with pytest.raises(ClipInvalid, match="is empty"):
                await client.create("red", clip=b"")
            with pytest.raises(ClipInvalid, match="cannot be read: No such file"):
                await client.create("red", clip=tmp_path / "missing.mp4")
            with pytest.raises(ClipTooLarge):
                await client.create("red", clip=bytes(30_000))

    run(test, SMALL)
