"""`echo-ray sessions` and the client's copies, against a real router: what they say and refuse."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from router_rig import Rig, run
from stored import new, ref

from echo_ray import cli
from echo_ray.client import EchoClient
from echo_ray.errors import ArchiveError, ArchiveForeign, SessionNotFound, UnavailableError
from echo_ray.session.forking import Past
from echo_ray.session.records import SessionState
from echo_ray.session.snapshot import Snapshot, encode


def planted(rig: Rig) -> None:
    """Session s1 of 30 chunks with a snapshot of chunk 24, paused."""
    record = new(
        model="fake", next_index=30, sealed=30, state=SessionState.PAUSED, labels={"old": "1"}
    )
    rig.directory.restore(Past(record=record, snapshots=[ref("p24", 24)]))
    rig.snapshots.put("s1", "p24", encode(Snapshot("fake", {}, {})))


async def said(rig: Rig, *words: str, status: int = 0) -> str:
    """What the command prints, on stdout if it did it and on stderr if it was refused."""
    program = [sys.executable, "-c", "import sys; from echo_ray.cli import main; sys.exit(main())"]
    call = [*program, "sessions", "--url", rig.url(""), *words]
    done = await asyncio.to_thread(subprocess.run, call, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    silent, spoken = (done.stderr, done.stdout) if status == 0 else (done.stdout, done.stderr)
    assert silent == ""
    return spoken.strip()


@pytest.mark.timeout(200)
def test_every_verb(tmp_path: Path) -> None:
    file = tmp_path / "one.echo"

    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        assert await said(rig, "list") == ""
        planted(rig)
        assert await said(rig, "list") == "s1  paused        30  -  a red ball"
        shown = await said(rig, "show", "s1")
        assert "next_chunk        30" in shown
        assert "labels            {'old': '1'}" in shown
        words = ["--chunk", "26", "--prompt", "blue", "--label", "a=b=c", "--label", "d="]
        made = await said(rig, "fork", "s1", *words, "--pace", "max", "--on-idle", "close")
        sid, state, chunk = made.split()[:3]
        record = rig.directory.get(sid)
        assert (state, chunk, record.next_index) == ("live", "26", 26)
        assert (record.labels, record.pace, record.on_idle) == (
            {"a": "b=c", "d": ""},
            "max",
            "close",
        )
        assert [(e.chunk, e.prompt) for e in rig.directory.controls(sid)] == [(26, "blue")]
        assert f"{file}  " in await said(rig, "export", "s1", str(file))
        assert "there already; name another" in await said(rig, "export", "s1", str(file), status=2)
        taken = await said(rig, "import", str(file))
        assert taken.split()[1:3] == ["paused", "30"]
        assert (await said(rig, "resume", "s1")).split()[1] == "live"
        assert (await said(rig, "pause", "s1")).split()[1] == "paused"
        successor = await said(rig, "rewind", "s1", "25")
        assert successor.split()[2] == "25"
        assert (await said(rig, "show", "s1")).split()[3] == "closed"
        assert await said(rig, "delete", "s1") == ""
        listed = await said(rig, "list")
        assert {line.split()[0] for line in listed.splitlines()} == {
            sid,
            taken.split()[0],
            successor.split()[0],
        }

    run(test, limit_s=190)


@pytest.mark.timeout(200)
def test_what_is_refused_is_one_line_with_the_code(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        planted(rig)
        for words, code in (
            (("show", "ghost"), "session_not_found"),
            (("fork", "s1", "--chunk", "99"), "segment_beyond_end"),
            (("fork", "s1", "--label", "a"), "invalid_request"),
            (("rewind", "s1", "-1"), "invalid_request"),
            (("export", "ghost", str(tmp_path / "x")), "session_not_found"),
            (("export", "s1", str(tmp_path / "none" / "x")), "archive_invalid"),
            (("import", str(tmp_path / "none")), "archive_invalid"),
        ):
            line = await said(rig, *words, status=2)
            assert line.startswith(f"echo-ray: {code}: "), line
            assert "\n" not in line
        assert await asyncio.to_thread(os.listdir, tmp_path) == []

    run(test, limit_s=190)


def test_no_service_no_verb_no_chunk(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sessions", "--url", "http://127.0.0.1:9", "list"]) == 2
    assert capsys.readouterr().err.startswith("echo-ray: unavailable: http://127.0.0.1:9 ")
    for words in ([], ["dance"], ["rewind", "s1"], ["rewind", "s1", "x"], ["fork"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["sessions", *words])


def test_the_client_copies_and_leaves_no_half_file(tmp_path: Path) -> None:
    file = tmp_path / "one.echo"

    async def test(rig: Rig) -> None:
        rig.replica("a")
        rig.router()
        planted(rig)
        async with EchoClient(rig.url("")) as client:
            made = await client.fork("s1", 26, prompt="blue", labels={})
            assert made["forked_from"] == {"session": "s1", "chunk": 26}
            assert made["labels"] == {}
            assert await client.export("s1", file) == len(await asyncio.to_thread(file.read_bytes))
            assert (await client.import_(await asyncio.to_thread(file.read_bytes)))[
                "next_chunk"
            ] == 30
            assert (await client.rewind("s1", 25))["next_chunk"] == 25
            with pytest.raises(SessionNotFound):
                await client.export("ghost", file)
            with pytest.raises(ArchiveError, match="cannot be read"):
                await client.import_(tmp_path / "none")
            with pytest.raises(ArchiveForeign):
                await client.import_(b"nothing")
        assert await asyncio.to_thread(os.listdir, tmp_path) == ["one.echo"]

    run(test)


def test_an_export_that_breaks_off_is_noticed(tmp_path: Path) -> None:
    async def test() -> None:
        async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nten bytes.")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(cut, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, EchoClient(f"http://127.0.0.1:{port}") as client:
            with pytest.raises(UnavailableError, match="broke off"):
                await client.export("s1", tmp_path / "one.echo")
        assert await asyncio.to_thread(os.listdir, tmp_path) == []

    asyncio.run(test())
