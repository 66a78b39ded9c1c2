"""What the Redis backend costs on this machine: `python tests/bench/redis_numbers.py [FOLDER]`.

Starts a server of its own in FOLDER (a temporary one by default) for each mode, and prints times,
and the commands, bytes and memory that chunks and sessions take.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from redis_server import RedisProcess
from stored import new

from echo_ray.clock import SystemClock
from echo_ray.session.records import Lease
from echo_ray.storage.redis_directory import RedisDirectory
from echo_ray.storage.redis_link import RedisServer
from echo_ray.storage.redis_snapshots import RedisSnapshots

DIGEST = "0123456789abcdef" * 4
FINGERPRINT = "echo-tiny/cpu/float32/threads=1/point=8/code=1/0123456789abcdef"
PROMPT = "a red ball rolls over a green table and meets a blue cube " * 2
BLOB_BYTES = 21 * 2**20


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


def timed(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return (time.perf_counter() - began_s) * 1000


def row(name: str, times_ms: list[float]) -> None:
    times_ms = sorted(times_ms)
    median, p99 = times_ms[len(times_ms) // 2], times_ms[int(len(times_ms) * 0.99)]
    say(f"  {name:<28} median {median:8.2f} ms   p99 {p99:8.2f} ms   n {len(times_ms)}")


def info(server: RedisProcess) -> dict[str, float]:
    found = {}
    for section in ("stats", "memory", "persistence", "commandstats"):
        for line in server.ask("INFO", section).decode().splitlines():
            name, _, value = line.partition(":")
            if name.startswith("cmdstat_") and name != "cmdstat_info":
                found["calls"] = found.get("calls", 0) + float(value.split("=")[1].split(",")[0])
            elif name in (
                "total_net_input_bytes",
                "total_net_output_bytes",
                "used_memory",
                "aof_current_size",
            ):
                found[name] = float(value)
    return found


def session(directory: RedisDirectory, name: str) -> Lease:
    directory.create(new(name, prompt=PROMPT))
    return directory.claim(name, "replica-0123456789abcdef", expect_epoch=0, ttl_s=60)


def make(directory: RedisDirectory, lease: Lease, index: int) -> None:
    directory.seal(lease, index)
    directory.commit(lease, index, DIGEST, FINGERPRINT)


def alone(directory: RedisDirectory, rounds: int, events: int) -> None:
    leases = [session(directory, f"alone-{n}") for n in range(50)]
    lease = leases[0]
    sealing, committing, renewing = [], [], []
    for n in range(rounds):
        sealing.append(timed(lambda n=n: directory.seal(lease, n)))
        committing.append(timed(lambda n=n: directory.commit(lease, n, DIGEST, FINGERPRINT)))
    for _ in range(rounds // 4):
        renewing.append(timed(lambda: directory.renew(leases, ttl_s=60)))
    appending = [
        timed(lambda n=n: directory.append_control("alone-1", f"event-{n}", PROMPT))
        for n in range(events)
    ]
    row("seal", sealing)
    row("commit", committing)
    row("renew, 50 leases", renewing)
    row("append_control", appending)
    row("get", [timed(lambda: directory.get("alone-0")) for _ in range(rounds)])
    row("list, 50 sessions", [timed(directory.list) for _ in range(50)])


def together(directory: RedisDirectory, threads: int, chunks: int) -> None:
    leases = [session(directory, f"together-{n}") for n in range(threads)]
    times: list[float] = []

    def stream(lease: Lease) -> None:
        times.extend(timed(lambda n=n: make(directory, lease, n)) for n in range(chunks))

    workers = [threading.Thread(target=stream, args=(lease,)) for lease in leases]
    took_ms = timed(lambda: ([w.start() for w in workers], [w.join() for w in workers]))
    row(f"seal + commit, {threads} at once", times)
    say(f"  {threads * chunks / took_ms * 1000:.0f} chunks/s from one Python process")


def blobs(directory: RedisDirectory, store: RedisSnapshots) -> None:
    lease = session(directory, "blobs")
    blob = os.urandom(BLOB_BYTES)
    over, meanwhile = threading.Event(), []

    def stream() -> None:
        index = 0
        while not over.is_set():
            meanwhile.append(timed(lambda n=index: make(directory, lease, n)))
            index += 1

    worker = threading.Thread(target=stream)
    worker.start()
    row("put 21 MiB", [timed(lambda n=n: store.put("blobs", f"p{n}", blob)) for n in range(4)])
    row("get 21 MiB", [timed(lambda n=n: store.get("blobs", f"p{n}")) for n in range(4)])
    over.set()
    worker.join()
    row("seal + commit meanwhile", meanwhile)


def costs(server: RedisProcess, directory: RedisDirectory) -> None:
    def difference(what: str, count: int, work: Callable[[], object]) -> None:
        before = info(server)
        work()
        after = info(server)
        each = {name: (after[name] - before[name]) / count for name in after}
        say(
            f"  {what:<28} {each['calls']:6.1f} commands (those in scripts too)  "
            f"{each['total_net_input_bytes']:6.0f} B in  {each['total_net_output_bytes']:6.0f} B "
            f"out  {each['aof_current_size']:6.0f} B log  {each['used_memory']:6.0f} B memory"
        )

    leases: list[Lease] = []
    difference(
        "a session, created, claimed",
        200,
        lambda: leases.extend(session(directory, f"c{n}") for n in range(200)),
    )
    difference(
        "a chunk", 4000, lambda: [make(directory, lease, n) for lease in leases for n in range(20)]
    )
    difference("a renewal, of 50 at once", 200, lambda: directory.renew(leases, ttl_s=60))
    difference(
        "an event",
        400,
        lambda: [directory.append_control(f"c{n % 200}", f"e{n}", PROMPT) for n in range(400)],
    )


def main(folder: Path) -> None:
    for mode in ("always", "everysec"):
        server = RedisProcess(folder / mode, appendfsync=mode).start()
        there = RedisServer(url=server.url, timeout_s=10)
        directory = RedisDirectory(there, SystemClock(), durability=mode)
        store = RedisSnapshots(there)
        try:
            say(f"appendfsync {mode}, storage.redis.durability {mode}")
            slow = mode == "everysec"
            # Creating waits a second each there: the sessions come from a directory that does not.
            if slow:
                quick = RedisDirectory(there, SystemClock(), durability="memory")
                alone(quick, 400, 20)
                say("  of which waits for the disk, by durability everysec:")
                append = directory.append_control
                appending = [
                    timed(lambda n=n, append=append: append("alone-2", f"e{n}", PROMPT))
                    for n in range(20)
                ]
                row("append_control", appending)
                together(quick, 16, 50)
                blobs(quick, store)
                quick.close()
            else:
                alone(directory, 400, 200)
                together(directory, 16, 50)
                blobs(directory, store)
                costs(server, directory)
        finally:
            directory.close()
            store.close()
            server.kill()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
