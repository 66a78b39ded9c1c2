"""The local stores on a full disk and under kill -9 keep what they acknowledged, and no halves."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import FakeClock
from stored import new

from echo_ray.storage.local import LocalDirectory, LocalSnapshots

WRITER = """
import itertools, os, sys
from echo_ray.clock import SystemClock
from echo_ray.session.records import SnapshotRef
from echo_ray.storage.local import LocalDirectory, LocalSnapshots

folder = sys.argv[1]
directory = LocalDirectory(folder + "/d.sqlite3", SystemClock())
blobs = LocalSnapshots(folder + "/snapshots")
record = directory.get("s1")
lease = directory.claim("s1", "r1", expect_epoch=record.epoch, ttl_s=1)
for n in itertools.count(record.next_index):
    directory.append_control("s1", f"e{n}", "p" * 500, at_chunk=n + 1)
    directory.renew([lease], ttl_s=1)
    directory.seal(lease, n)
    directory.commit(lease, n, f"d{n}", "fp")
    if n % 3 == 0:
        blobs.put("s1", f"p{n}", str(n).encode() * 20_000)
        ref = SnapshotRef(id=f"p{n}", session_id="s1", chunk_index=n, size_bytes=1, digest="d",
                          created_at=0.0, store="local", epoch=lease.epoch)
        directory.add_snapshot(lease, ref)
    os.write(1, f"{n}\\n".encode())
"""


def killed_after(folder: Path, lines: int) -> int:
    """Run a writer, kill it once it has acknowledged some; the last chunk it acknowledged."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        for _ in range(lines):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    return len(rest.split()) + lines


def test_kill_9_loses_nothing_acknowledged_and_leaves_no_half(tmp_path: Path) -> None:
    directory = LocalDirectory(tmp_path / "d.sqlite3", FakeClock())
    directory.create(new())
    directory.close()
    dice = random.Random(7)
    for _ in range(5):
        before = LocalDirectory(tmp_path / "d.sqlite3", FakeClock())
        start = before.get("s1").next_index
        before.close()
        acknowledged = start + killed_after(tmp_path, dice.randint(1, 40))
        reopened = LocalDirectory(tmp_path / "d.sqlite3", FakeClock())
        record = reopened.get("s1")
        assert acknowledged <= record.next_index <= acknowledged + 1
        assert record.next_index <= record.sealed <= record.next_index + 1
        assert reopened.digests("s1", 0, 10**6) == {n: f"d{n}" for n in range(record.next_index)}
        events = {e.event_id for e in reopened.controls("s1")}
        assert events >= {f"e{n}" for n in range(acknowledged)}
        blobs = LocalSnapshots(tmp_path / "snapshots")
        recorded = {ref.chunk_index for ref in reopened.snapshots("s1")}
        assert recorded >= set(range(0, acknowledged, 3))
        for n in recorded:
            assert blobs.get("s1", f"p{n}") == str(n).encode() * 20_000
        assert not list((tmp_path / "snapshots").glob("*/*.half"))
        reopened.close()
        connection = sqlite3.connect(tmp_path / "d.sqlite3")
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.close()


FILLER = """
import json, os, resource, sys
from pathlib import Path
from echo_ray.clock import SystemClock
from echo_ray.errors import EchoError, StoreFull
from echo_ray.session.records import SessionRecord
from echo_ray.storage.local import LocalDirectory, LocalSnapshots

folder, how = Path(sys.argv[1]), sys.argv[2]
ballast = folder / "ballast"
directory = LocalDirectory(folder / "d.sqlite3", SystemClock())
blobs = LocalSnapshots(folder / "snapshots")
directory.create(SessionRecord(id="s1", model="m", prompt="p", seed=1))
lease = directory.claim("s1", "r1", expect_epoch=0, ttl_s=9)
blobs.put("s1", "kept", b"kept")
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
if how == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, unlimited[1]))
else:
    ballast.write_bytes(bytes(600_000))

def until_it_fails(write):
    for n in range(5000):
        try:
            write(n)
        except EchoError as error:
            return n, type(error).__name__, error.message
    return 5000, "none", ""

blob = until_it_fails(lambda n: blobs.put("s1", f"b{n}", bytes(400_000)))
control = until_it_fails(lambda n: directory.append_control("s1", f"e{n}", "p" * 2000))
seal = until_it_fails(lambda n: (directory.seal(lease, n), directory.commit(lease, n, "d", "f")))
report = {"blob": blob, "control": control, "seal": seal}
report["while_full"] = [len(directory.controls("s1")), directory.get("s1").next_index]
report["kept"] = blobs.get("s1", "kept").decode()
report["half"] = [p.name for p in (folder / "snapshots").rglob("*.half")]
report["stray"] = [p.name for p in folder.glob(".room-*")]
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
ballast.unlink(missing_ok=True)
for n in range(blob[0]):
    blobs.delete("s1", f"b{n}")
blobs.put("s1", "later", bytes(100_000))
report["later"] = directory.append_control("s1", "later", "p").event_id
directory.close()
again = LocalDirectory(folder / "d.sqlite3", SystemClock())
report["at_last"] = [len(again.controls("s1")), again.get("s1").next_index]
again.close()
print(json.dumps(report))
"""


def check_filled(output: str) -> None:
    report = json.loads(output)
    for what in ("blob", "control", "seal"):
        _, kind, message = report[what]
        assert kind == "StoreFull", (what, report[what])
        assert "free disk space" in message
    written, made = report["control"][0], report["seal"][0]
    assert written > 0
    assert report["while_full"] == [written, made]
    assert report["at_last"] == [written + 1, made]
    assert report["kept"] == "kept"
    assert report["later"] == "later"
    assert report["half"] == report["stray"] == []


def test_a_limit_on_file_size_is_a_full_disk(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FILLER, str(tmp_path), "limit"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check_filled(done.stdout)


def test_a_full_file_system_is_a_full_disk(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("needs unshare to mount a small file system of its own")
    mount = 'mount -t tmpfs -o size=1m none "$1" || exit 77; exec "$2" -c "$3" "$1" tmpfs'
    done = subprocess.run(
        [unshare, "-m", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, FILLER],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this user may not mount a file system")
    assert done.returncode == 0, done.stderr
    check_filled(done.stdout)
