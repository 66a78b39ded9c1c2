"""The client against a real router: verbs, streams over crashes, and what it refuses to believe."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
from typing import Any

import pytest
from fake_replica import FakeReplica, frames
from router_rig import Rig, run
from websockets.asyncio.server import ServerConnection, serve

from echo_ray import wire
from echo_ray.client import EchoClient
from echo_ray.errors import (
    ConflictError,
    MessageError,
    PromptError,
    SegmentBeyondEnd,
    SessionNotFound,
    UnavailableError,
)


def client_of(rig: Rig, router: int = 0, **more: Any) -> EchoClient:
    return EchoClient(rig.url("", router), **more)


def test_the_verbs() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.replica("b")
        rig.router()
        async with client_of(rig) as client:
            assert await client.ready()
            session = await client.create(
                "red", seed=7, pace="max", on_idle="continue", model="fake", labels={"a": "b"}
            )
            sid = session["id"]
            assert await client.get(sid) == session
            assert await client.sessions() == [session]
            assert await client.send_event(sid, "blue", event_id="e1", at_chunk=3) == 3
            assert await client.send_event(sid, "blue", event_id="e1", at_chunk=3) == 3
            seen = []
            async for segment in client.segments(sid, start=0):
                seen.append(segment)
                if segment.index == 5:
                    break
            assert [s.metadata.prompt for s in seen] == ["red"] * 3 + ["blue"] * 3
            assert not any(s.metadata.ignored_words for s in seen)
            assert await client.segment(sid, 2) == frames(7, 2, "red")
            assert await client.snapshots(sid) == []
            with pytest.raises(ConflictError, match="first point comes at chunk 4"):
                await client.pin_snapshot(sid)
            rig.owner(sid).snapshot(sid, 4)
            assert (await client.pin_snapshot(sid))["chunk_index"] == 4
            source = rig.owner(sid).name
            target = "b" if source == "a" else "a"
            assert (await client.migrate(sid))["target"] == target
            assert [r["id"] for r in await client.replicas()] == ["a", "b"]
            assert (await client.pause(sid))["state"] == "paused"
            assert (await client.resume(sid))["state"] == "live"
            await client.delete(sid)
            with pytest.raises(SessionNotFound):
                await client.get(sid)
            with pytest.raises(PromptError) as caught:
                await client.create("")
            assert caught.value.param == "prompt"

    run(test)


def test_ignored_words_come_with_each_segment() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        async with client_of(rig) as client:
            sid = (await client.create("a lovely ball", seed=7, pace="max"))["id"]
            await client.send_event(sid, "blue", at_chunk=2)
            seen = []
            async for segment in client.segments(sid, start=0):
                seen.append(segment.metadata.ignored_words)
                if segment.index == 3:
                    break
        assert seen == [("lovely",), ("lovely",), (), ()]

    run(test)


def test_a_stream_goes_on_over_a_dead_replica_and_a_dead_router() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.replica("b")
        rig.router()
        sid = await rig.create()
        kinds: list[str] = []
        indices = []
        async with client_of(rig) as client:
            port = int(rig.routers[0].address.split(":")[1])
            stream = client.segments(sid, start=0, on_message=lambda m: kinds.append(m.type))
            async for segment in stream:
                indices.append(segment.index)
                assert segment.data == frames(7, segment.index, "red")
                if segment.index == 5:
                    await rig.owner(sid).crash()
                if segment.index == 10:
                    await rig.routers.pop().stop()
                    http = rig.config.http
                    rig.router(http=type(http)(port=port, max_message_bytes=4096))
                if segment.index == 20:
                    break
        assert indices == list(range(21))
        assert kinds.count("session.created") == 2
        assert "session.going_away" in kinds

    run(test)


def test_without_a_start_it_begins_at_the_live_edge() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        sid = await rig.create()
        async with rig.watch(sid, "&from=0") as viewer:
            await viewer.until(5)
        edge = rig.directory.get(sid).next_index
        async with client_of(rig) as client:
            async for segment in client.segments(sid):
                assert segment.index >= edge
                break

    run(test)


def test_the_reader_is_the_backpressure() -> None:
    async def test(rig: Rig) -> None:
        fake: FakeReplica = rig.replica("a", padding=1000)
        rig.router()
        sid = await rig.create()
        async with client_of(rig) as client:
            async for segment in client.segments(sid, start=0):
                if segment.index >= 3:
                    before = fake.sessions[sid].next
                    await asyncio.sleep(0.2)
                    after = fake.sessions[sid].next
                    assert after - before <= 2 * rig.config.session.lead_chunks
                    break

    run(test)


def test_the_end_of_a_session_ends_the_stream() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        sid = await rig.create()
        async with client_of(rig) as client:
            async for segment in client.segments(sid, start=0):
                if segment.index == 2:
                    await client.delete(sid)
            with pytest.raises(SessionNotFound):
                async for _ in client.segments(sid, start=0):
                    pass

    run(test)


def test_a_refusal_is_raised_and_not_retried() -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        sid = await rig.create()
        async with client_of(rig) as client:
            with pytest.raises(SegmentBeyondEnd):
                async for _ in client.segments(sid, start=99):
                    pass

    run(test)


def test_patience_ends_and_says_so() -> None:
    async def test() -> None:
        async with EchoClient("http://127.0.0.1:9", patience_s=0.0) as client:
            assert not await client.ready()
            with pytest.raises(UnavailableError):
                await client.get("ses_x")
            with pytest.raises(UnavailableError):
                async for _ in client.segments("ses_x", start=0):
                    pass

    asyncio.run(test())


def metadata(index: int, data: bytes, digest: str = "", **more: Any) -> str:
    return wire.encode(
        wire.ChunkMetadata(
            chunk_index=index,
            num_frames=1,
            pts_ms=0,
            byte_length=len(data),
            digest=digest,
            epoch=1,
            **more,
        )
    )


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ([b"abc"], "without its metadata"),
        ([metadata(1, b"abc"), b"abc"], "came where 0 was due"),
        ([metadata(0, b"abc"), b"abcd"], "4 bytes; 3 were announced"),
        ([metadata(0, b"abc", "0" * 64), b"abc"], "does not match its digest"),
        ([metadata(0, b"abc", ignored_words=("",)).replace('""]', "1]")], "not a list of strings"),
        (["nope"], "not JSON"),
    ],
)
def test_a_server_that_breaks_its_word_is_not_believed(
    script: list[str | bytes], says: str
) -> None:
    async def liar(socket: ServerConnection) -> None:
        for message in script:
            await socket.send(message)
        await socket.wait_closed()

    async def test() -> None:
        async with serve(liar, "127.0.0.1", 0) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            async with EchoClient(f"http://127.0.0.1:{port}") as client:
                with pytest.raises(MessageError, match=says):
                    async for _ in client.segments("ses_x", start=0):
                        pass

    asyncio.run(test())


async def vanish(socket: ServerConnection, how: int | None) -> None:
    """Go without having said that the session is over: with a close code, or with none."""
    if how is None:
        socket.transport.abort()
    else:
        await socket.close(how)


@pytest.mark.parametrize("how", [1000, 1001, 1011, 1012, None])
def test_a_server_that_vanishes_is_asked_again_at_the_next_index(how: int | None) -> None:
    asked: list[str] = []

    async def fickle(socket: ServerConnection) -> None:
        assert socket.request is not None
        asked.append(socket.request.path.rpartition("=")[2])
        if len(asked) < 3:
            data = bytes([len(asked)])
            await socket.send(metadata(len(asked) - 1, data, hashlib.sha256(data).hexdigest()))
            await socket.send(data)
        await vanish(socket, how)

    seen: list[int] = []

    async def read(client: EchoClient) -> None:
        async for segment in client.segments("ses_x", start=0):
            seen.append(segment.index)

    async def test() -> None:
        async with serve(fickle, "127.0.0.1", 0) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            async with EchoClient(f"http://127.0.0.1:{port}", patience_s=0.0) as client:
                with pytest.raises(UnavailableError, match="ConnectionClosed"):
                    await read(client)
        assert seen == [0, 1]
        assert asked[:3] == ["0", "1", "2"]

    asyncio.run(test())


def test_the_client_needs_neither_torch_nor_ray_nor_the_server() -> None:
    code = (
        "import sys, echo_ray.client\n"
        "heavy = {'torch', 'ray', 'fastapi', 'numpy', 'av'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
