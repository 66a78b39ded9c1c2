"""python -m sim.scale --sessions 10000 --replicas 2000     (from tests/; or `make scale`)

Loses a share of a cluster's nodes at once and says how long streams stand still, and what the store
has to do. Nodes hold eight replicas and a router; the network is the simulation's; the store is one
queue, whose every call takes the time that `tests/bench/scale_costs.py` measured on a Redis server
under load. Each session has one viewer, that buffers two seconds. `docs/scale.md` has the results.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from sim import people
from sim.kernel import Host, Waiting, World
from sim.ledger import Ledger
from sim.network import Call, Network
from sim.people import Viewer
from sim.plans import CALM
from sim.replica import LEASE_TTL_S, Replica
from sim.router import Router
from sim.scenario import Cluster
from sim.store import TIMEOUT_S, Asked, Store, _lost
from sim.stream import POINT_EVERY

from echo_ray.session import locating
from echo_ray.session.records import OnIdle, SessionRecord

REPLICAS_PER_NODE = 8
CALM_S, WATCHED_S = 5.0, 12.0
"""Virtual seconds before the loss, and after it."""
PRICED_S = 3.5
"""Until then everybody comes at once, and the store does everything in no time."""
SLOW = 2.0
"""Chunks take twice the simulation's usual 20 to 80 ms."""
COSTS_US = {
    "seal": 18.0,
    "commit": 18.0,
    "get": 2.0,
    "claim": 20.0,
    "controls": 2.0,
    "digests": 5.0,
    # Twice what was measured: the simulation renews half as often as the service does.
    "renew": 44.0,
    "put_replica": 20.0,
    "list": 31.0,
}
"""Of the store's processor, for each call; others take `OTHER_US`."""
OTHER_US = 10.0
REPLICA_US = 0.47
"""For each one when all replicas are read."""
FEW_US = 15.0
"""For a sample of them: 61 to 102 one at a time, and under load a seventh, as of heartbeats."""
BLOB_S = 0.2
"""To read a snapshot back: 21 MB at 1 Gbit/s, from a store that does not queue."""


@dataclass(slots=True)
class Load:
    """What was asked of the store, by call and tenth of a second, and how long it was busy."""

    asked: Counter[tuple[str, int]] = field(default_factory=Counter)
    busy_s: Counter[int] = field(default_factory=Counter)
    waited_s: dict[int, float] = field(default_factory=dict)

    def peak(self, name: str, since_s: float) -> int:
        """The most calls of a name in any one second from `since_s` on."""
        first = int(since_s * 10)
        tenths = [self.asked[name, n] for n in range(first, first + int(WATCHED_S * 10))]
        return max(sum(tenths[n : n + 10]) for n in range(len(tenths)))

    def total(self, name: str, since_s: float) -> int:
        return sum(n for (what, at), n in self.asked.items() if what == name and at >= since_s * 10)


class Queued(Call):
    """A call to a server that does one after the other, each in its time."""

    __slots__ = ("_ready",)

    def __init__(self, *given: Any, ready: Callable[[], float], **named: Any) -> None:
        super().__init__(*given, **named)
        self._ready = ready

    def _serve(self, host: Host, waiting: Waiting) -> None:
        try:
            outcome = self._work()
        except Exception as error:
            outcome = error
        network = self._network
        answer = partial(network.send, self._target, host, partial(waiting, outcome))
        network.world.after(self._ready(), answer)


class ScaleStore(Store):
    """The store as one queue."""

    def __init__(
        self,
        host: Host,
        network: Network,
        ledger: Ledger,
        load: Load,
        replica_us: float,
        sampled: bool,
    ) -> None:
        super().__init__(host, network, ledger)
        self.load = load
        self._replica_us = replica_us
        self._sampled = sampled
        self._free_s = 0.0
        self._name = "other"
        for name in (*COSTS_US, "blob"):
            setattr(self, name, partial(self._named, name, getattr(self, name)))

    def replicas(
        self, caller: Host, *, among: int | None = None, named: Collection[str] = ()
    ) -> Asked:
        few = among is not None and self._sampled
        asked = super().replicas(caller, among=among if few else None, named=named)
        return self._named("few replicas" if few else "all replicas", lambda: asked)

    def _named(self, name: str, method: Callable[..., Asked], *given: Any, **named: Any) -> Asked:
        asked = method(*given, **named)

        def whole() -> Iterator[Any]:
            # The first step of `asked` makes the call, and takes the name with it.
            self._name = name
            return (yield from asked)

        return whole()

    def _ask(self, caller: Host, work: Callable[[], Any]) -> Asked:
        name, self._name = self._name, "other"
        # Sweeps read what they need and no more, which `Directory.orphans` says.
        done = self.directory.orphans if name == "list" else work
        ready = partial(self._ready, name)
        call = Queued(self._network, self.host, done, timeout_s=TIMEOUT_S, lost=_lost, ready=ready)
        outcome = yield call
        return outcome

    def _ready(self, name: str) -> float:
        """Seconds until a call that comes now is done."""
        now_s = self.host.world.now_s
        if name == "all replicas":
            cost_s = self._replica_us * 1e-6 * len(self.directory._replicas)
        elif name == "few replicas":
            cost_s = FEW_US * 1e-6
        else:
            cost_s = COSTS_US.get(name, OTHER_US) * 1e-6
        if now_s < PRICED_S:
            cost_s = 0.0
        tenth = int(now_s * 10)
        self._free_s = max(self._free_s, now_s) + cost_s
        self.load.asked[name, tenth] += 1
        self.load.busy_s[tenth] += cost_s
        waited_s = self._free_s - now_s
        self.load.waited_s[tenth] = max(self.load.waited_s.get(tenth, 0.0), waited_s)
        return waited_s + (BLOB_S if name == "blob" else 0.0)


class Arrivals(Ledger):
    """Also notes when each viewer got its first segment after the loss."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.world = world
        self.since_s = float("inf")
        self.first_s: dict[str, float] = {}
        self.last_s: dict[str, float] = {}
        self.longest_s: dict[str, float] = {}
        """The longest time without a segment since the loss, by viewer."""
        self.made_s: dict[str, float] = {}

    def committed(self, lease: Any, index: int, digest: str) -> None:
        super().committed(lease, index, digest)
        if self.world.now_s > self.since_s:
            self.made_s.setdefault(lease.session_id, self.world.now_s - self.since_s)

    def delivered(self, session_id: str, viewer: str, *given: Any) -> None:
        super().delivered(session_id, viewer, *given)
        if self.world.now_s > self.since_s:
            self.first_s.setdefault(viewer, self.world.now_s - self.since_s)
            self.silent(viewer)
            self.last_s[viewer] = self.world.now_s

    def silent(self, viewer: str) -> float:
        """Note that the viewer has got nothing until now; returns its longest such time."""
        silence_s = self.world.now_s - self.last_s.get(viewer, self.since_s)
        self.longest_s[viewer] = max(silence_s, self.longest_s.get(viewer, 0.0))
        return self.longest_s[viewer]


@dataclass(slots=True)
class Loss:
    """What was lost, and when."""

    sessions: set[str]
    routers: set[str]
    replay: list[int]
    """Chunks from each lost session's newest snapshot to where it was."""


def build(
    seed: int, sessions: int, replicas: int, replica_us: float, *, sampled: bool = True
) -> tuple[Cluster, Load, list[list[Host]]]:
    """A cluster whose sessions are spread evenly, and its nodes."""
    world, load = World(seed), Load()
    network, ledger = Network(world), Arrivals(world)
    store = ScaleStore(Host(world, "store"), network, ledger, load, replica_us, sampled)
    machines = {f"r{n}": Replica(Host(world, f"r{n}"), store) for n in range(replicas)}
    count = max(1, replicas // REPLICAS_PER_NODE)
    routers = [Router(Host(world, f"t{n}"), network, store, ledger, machines) for n in range(count)]
    plan = replace(CALM, name="scale", faults_per_s=0.0, troubled_s=CALM_S + WATCHED_S)
    cluster = Cluster(plan, world, network, ledger, store, machines, routers)
    hosts = list(machines.values())
    nodes = [
        [r.host for r in hosts[n * REPLICAS_PER_NODE : (n + 1) * REPLICAS_PER_NODE]]
        + [routers[n].host]
        for n in range(count)
    ]
    # Spread over the time between two renewals, as processes that began at any time.
    for part in (*hosts, *routers):
        world.after(world.rng.random(), partial(_begin, part))
    for n in range(sessions):
        _open(cluster, n, hosts[n % replicas].id)
    return cluster, load, nodes


def _begin(part: Replica | Router) -> None:
    part.host.slow = SLOW
    part.start()


def _open(cluster: Cluster, number: int, owner: str) -> None:
    directory, ledger = cluster.store.directory, cluster.ledger
    record = SessionRecord(
        id=f"s{number}",
        model="sim",
        prompt=f"prompt {number}",
        seed=number,
        on_idle=OnIdle.PAUSE,
        created_at=float(number),
    )
    directory.create(record)
    ledger.created(record, stops_idle=True)
    ledger.claimed(directory.claim(record.id, owner, expect_epoch=0, ttl_s=LEASE_TTL_S))
    viewer = Viewer(f"v{number}", record.id)
    cluster.viewers.append(viewer)
    host = Host(cluster.world, viewer.name)
    cluster.world.after(1.0, partial(host.run, people.view(cluster, viewer, host)))


def lose(cluster: Cluster, nodes: list[list[Host]], share: float) -> Loss:
    """Let that share of the nodes vanish, with everything on them, and nobody told."""
    gone = cluster.world.rng.sample(nodes, max(1, round(len(nodes) * share)))
    names = {host.name for node in gone for host in node}
    owned: set[str] = set()
    replay = []
    for record in cluster.store.directory.list():
        if (record.owner or "").partition(".")[0] in names:
            owned.add(record.id)
            refs = cluster.store.directory.snapshots(record.id)
            replay.append(record.next_index - max((r.chunk_index for r in refs), default=0))
    routed = {pull.session_id for r in cluster.routers if r.host.name in names for pull in r.pulls}
    ledger = cluster.ledger
    assert isinstance(ledger, Arrivals)
    ledger.since_s = cluster.world.now_s
    for node in gone:
        for host in node:
            host.crash(silent=True)
    return Loss(owned, routed, replay)


def percentiles(seconds: list[float]) -> str:
    found = sorted(seconds)
    if not found:
        return "none"
    at = {"median": 0.5, "p95": 0.95, "worst": 1.0}
    return "  ".join(
        f"{name} {found[min(len(found) - 1, int(len(found) * part))]:5.2f} s"
        for name, part in at.items()
    )


def report(cluster: Cluster, load: Load, loss: Loss, took_s: float) -> str:
    """What is printed of a run."""
    ledger = cluster.ledger
    assert isinstance(ledger, Arrivals)
    names = {v.session_id: v.name for v in cluster.viewers}
    waits = {s: ledger.first_s.get(names[s], WATCHED_S) for s in names}
    groups = {
        "lost owner": loss.sessions - loss.routers,
        "lost owner, chunk committed": loss.sessions,
        "lost router": loss.routers - loss.sessions,
        "lost both": loss.routers & loss.sessions,
        "lost neither": set(names) - loss.routers - loss.sessions,
    }
    lines = []
    for name, members in groups.items():
        times = [ledger.made_s.get(s, WATCHED_S) for s in members]
        if "committed" not in name:
            times = [waits[s] for s in members]
        lines.append(f"{name:<28} {len(members):6,}  {percentiles(times)}")
    silences = [ledger.silent(v.name) for v in cluster.viewers]
    lines.append(f"{'everybody, longest silence':<28} {len(silences):6,}  {percentiles(silences)}")
    stalls = [v.worst_stall_s for v in cluster.viewers]
    before, peak = int(CALM_S * 10) - 20, int(CALM_S * 10)
    calm = sum(load.busy_s[n] for n in range(before, peak)) / 2
    tenths = range(peak, peak + int(WATCHED_S * 10))
    counts = [len(r.seats) for r in cluster.replicas.values() if r.host.up]
    lines += [
        f"stalled at a 2 s buffer      {sum(s > 0 for s in stalls):6,}  worst {max(stalls):.2f} s",
        f"store busy: calm {calm:.0%}, worst second after the loss "
        f"{max(sum(load.busy_s[n + k] for k in range(10)) for n in tenths):.0%}, longest wait "
        f"{max(load.waited_s.get(n, 0.0) for n in tenths) * 1000:.0f} ms",
        "after the loss, in all (most in a second): "
        + ", ".join(
            f"{name} {load.total(name, CALM_S):,} ({load.peak(name, CALM_S):,})"
            for name in ("claim", "few replicas", "all replicas", "blob", "get")
        ),
        f"sessions of a surviving replica: mean {sum(counts) / len(counts):.2f}, "
        f"most {max(counts)}",
        f"chunks made again: mean {sum(loss.replay) / max(1, len(loss.replay)):.1f}, most "
        f"{max(loss.replay, default=0)} (a point every {POINT_EVERY})",
        f"{cluster.world.acts:,} acts in {took_s:.0f} s of this machine",
    ]
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="sim.scale", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--replicas", type=int, default=2_000)
    parser.add_argument("--lost", type=float, default=0.05, help="share of the nodes")
    parser.add_argument(
        "--all", action="store_true", help="routers read all replicas, instead of a few"
    )
    asked = parser.parse_args()
    # Looking for cycles among millions of objects takes longer than the run.
    gc.disable()
    began_s = time.monotonic()
    cluster, load, nodes = build(
        asked.seed, asked.sessions, asked.replicas, REPLICA_US, sampled=not asked.all
    )
    cluster.world.run(CALM_S)
    loss = lose(cluster, nodes, asked.lost)
    cluster.world.run(CALM_S + WATCHED_S)
    sys.stdout.write(
        f"{asked.sessions:,} sessions, {asked.replicas:,} replicas on {len(nodes)} nodes, "
        f"{asked.lost:.0%} lost, "
        f"placed among {'all' if asked.all else locating.SAMPLE}, seed {asked.seed}\n"
        + report(cluster, load, loss, time.monotonic() - began_s)
        + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
