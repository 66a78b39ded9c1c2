"""What the directory promises when many ask at once, in threads and in processes."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fakes import FakeClock
from rivals import race
from stored import new, owned

from echo_ray.clock import SystemClock
from echo_ray.errors import EventIdConflict, Fenced
from echo_ray.session.records import Lease
from echo_ray.storage.interface import Directory
from echo_ray.storage.local import LocalDirectory

THREADS = 6


def together(*jobs: Callable[[], object]) -> list[object]:
    """Run the jobs in threads that begin at the same moment; raises what any of them raised."""
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], object]) -> object:
        start.wait(50)
        return job()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(jobs)) as pool:
            return list(pool.map(run, jobs))
    finally:
        sys.setswitchinterval(interval)


def claims_won(directory: Directory, owner: str, rounds: int, gate: threading.Barrier) -> list[int]:
    won = []
    for epoch in range(rounds):
        gate.wait(50)
        try:
            directory.claim("s1", owner, expect_epoch=epoch, ttl_s=1)
        except Fenced:
            continue
        won.append(epoch)
    return won


def test_of_claims_at_once_exactly_one_wins(directory: Directory) -> None:
    directory.create(new())
    gate = threading.Barrier(THREADS)
    jobs = [lambda n=n: claims_won(directory, f"r{n}", 30, gate) for n in range(THREADS)]
    won = together(*jobs)
    epochs = sorted(epoch for mine in won for epoch in mine)  # type: ignore[attr-defined]
    assert epochs == list(range(30))
    assert directory.get("s1").epoch == 30


def test_an_entry_is_never_pinned_at_or_below_a_sealed_chunk(directory: Directory) -> None:
    lease = owned(directory)
    chunks = 40
    sealed: dict[int, list[str]] = {}
    done, spoken = threading.Event(), threading.Semaphore(0)

    def generate() -> None:
        try:
            for n in range(chunks):
                assert spoken.acquire(timeout=50)
                sealed[n] = [e.event_id for e in directory.seal(lease, n)]
                directory.commit(lease, n, "d", "fp")
        finally:
            done.set()

    def speak(name: str) -> list[tuple[str, int]]:
        said = []
        while not done.is_set():
            event_id = f"{name}-{len(said)}"
            said.append((event_id, directory.append_control("s1", event_id, "p").chunk))
            spoken.release()
        return said

    _, *said = together(generate, *(lambda n=n: speak(f"t{n}") for n in range(3)))
    log = directory.controls("s1")
    for n in range(chunks):
        assert sealed[n] == [e.event_id for e in log if e.chunk == n]
    answered = [pair for mine in said for pair in mine]  # type: ignore[attr-defined]
    assert sorted(answered) == sorted((e.event_id, e.chunk) for e in log)
    assert len(answered) >= chunks


def test_of_one_event_sent_at_once_one_is_kept(directory: Directory) -> None:
    owned(directory)

    def send(prompt: str) -> str:
        try:
            return directory.append_control("s1", "e1", prompt).prompt
        except EventIdConflict:
            return "conflict"

    answers = together(*(lambda n=n: send(f"p{n % 2}") for n in range(THREADS)))
    (kept,) = directory.controls("s1")
    assert sorted(answers) == sorted([kept.prompt] * 3 + ["conflict"] * 3)  # type: ignore[type-var]


def test_of_writers_under_two_epochs_only_the_newer_goes_on(directory: Directory) -> None:
    old = owned(directory)
    heirs: list[Lease] = []

    def generate(lease: Lease) -> int:
        made = 0
        try:
            while made < 60:
                n = directory.get("s1").next_index
                directory.seal(lease, n)
                directory.commit(lease, n, f"{lease.epoch}", "fp")
                made += 1
        except Fenced:
            return made
        return made

    def take_over() -> int:
        heirs.append(directory.claim("s1", "r2", expect_epoch=1, ttl_s=1))
        return generate(heirs[0])

    by_old, by_heir = together(lambda: generate(old), take_over)
    writers = list(directory.digests("s1", 0, 1000).values())
    assert writers == ["1"] * int(str(by_old)) + ["2"] * int(str(by_heir))
    assert by_heir == 60


RIVAL = """
import json, sys
from echo_ray.clock import SystemClock
from echo_ray.errors import Fenced
from echo_ray.storage.local import LocalDirectory

path, owner, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
directory = LocalDirectory(path, SystemClock())
won = []
for epoch in range(rounds):
    try:
        directory.claim("s1", owner, expect_epoch=epoch, ttl_s=1)
        won.append(epoch)
    except Fenced:
        pass
    directory.append_control("s1", f"{owner}-{epoch}", "p")
directory.close()
print(json.dumps(won), flush=True)
"""


def test_of_claims_from_several_processes_exactly_one_wins(tmp_path: Path) -> None:
    path, rounds = tmp_path / "d.sqlite3", 25
    directory = LocalDirectory(path, SystemClock())
    directory.create(new())
    outputs = race(RIVAL, [[str(path), f"r{n}", str(rounds)] for n in range(3)])
    epochs = sorted(epoch for output in outputs for epoch in json.loads(output))
    assert epochs == list(range(rounds))
    assert directory.get("s1").epoch == rounds
    assert len(directory.controls("s1")) == 3 * rounds
    directory.close()


def test_a_new_database_can_be_opened_by_many_at_once(tmp_path: Path) -> None:
    clock = FakeClock()
    for n in range(5):
        path = tmp_path / str(n) / "d.sqlite3"
        opened = together(*(lambda path=path: LocalDirectory(path, clock) for _ in range(THREADS)))
        for index, directory in enumerate(opened):
            assert isinstance(directory, LocalDirectory)
            directory.create(new(f"s{index}"))
        for directory in opened:
            assert isinstance(directory, LocalDirectory)
            assert len(directory.list()) == THREADS
            directory.close()
