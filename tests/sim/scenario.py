"""One run: sessions and people on replicas and routers, faults for a while, then peace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from sim import faults, people
from sim.kernel import Host, World
from sim.ledger import Ledger
from sim.network import Network
from sim.people import Viewer
from sim.plans import Plan
from sim.replica import Replica
from sim.router import Router
from sim.store import Store
from sim.stream import CHUNK_S

from echo_ray.session.records import OnIdle, Pace, SessionRecord, SessionState

RECOVERY_S = 8.0
"""From the end of all faults, every session that is wanted goes on within this time."""
INSPECTION_S = 0.5
"""How often what must stay small is looked at, in virtual seconds."""


@dataclass(slots=True)
class Cluster:
    """Everything of one run."""

    plan: Plan
    world: World
    network: Network
    ledger: Ledger
    store: Store
    replicas: dict[str, Replica]
    routers: list[Router]
    viewers: list[Viewer] = field(default_factory=list)
    people: list[Host] = field(default_factory=list)
    """The machines of viewers and clients."""
    records: list[SessionRecord] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    peace: bool = False

    def published(self, viewer: Viewer) -> Sequence[str]:
        """The digests of the session's committed chunks."""
        return self.ledger.books[viewer.session_id].published

    def worst_stall_s(self) -> float:
        return max((v.worst_stall_s for v in self.viewers), default=0.0)


def build(seed: int, plan: Plan) -> Cluster:
    """A cluster that begins to work."""
    world = World(seed)
    network, ledger = Network(world), Ledger(world)

    def host(name: str) -> Host:
        skew_s = world.rng.uniform(-plan.skew_s, plan.skew_s)
        return Host(world, name, skew_s=skew_s, rate=world.rng.uniform(0.99, 1.01))

    store = Store(host("store"), network, ledger)
    replicas = {f"r{n}": Replica(host(f"r{n}"), store) for n in range(plan.replicas)}
    routers = [Router(host(f"t{n}"), network, store, ledger, replicas) for n in range(plan.routers)]
    cluster = Cluster(plan, world, network, ledger, store, replicas, routers)
    for process in (*replicas.values(), *routers):
        process.start()
    for number in range(plan.sessions):
        _open(cluster, number)
    world.after(INSPECTION_S, partial(_inspect, cluster))
    return cluster


def run(seed: int, plan: Plan) -> Cluster:
    """The whole run. Raises `Breach`; the log is in the error's note."""
    cluster = build(seed, plan)
    world = cluster.world
    try:
        _trouble(cluster)
        world.run(plan.troubled_s)
        world.note("peace")
        cluster.peace = True
        faults.heal(cluster)
        for record in cluster.records:
            host = _person(cluster, f"p{record.id}")
            host.run(people.wake(cluster, record, host))
        world.run(plan.troubled_s + RECOVERY_S)
        before = {v.name: v.next for v in cluster.viewers}
        made = {r.id: len(cluster.ledger.books[r.id].published) for r in cluster.records}
        world.run(plan.troubled_s + RECOVERY_S + plan.peaceful_s)
        _settled(cluster, before, made)
    except BaseException as error:
        error.add_note("\n".join(world.log))
        raise
    return cluster


def _open(cluster: Cluster, number: int) -> None:
    rng, plan = cluster.world.rng, cluster.plan
    goes_on = rng.random() < 0.4
    record = SessionRecord(
        id=f"s{number}",
        model="sim",
        prompt=f"prompt {number}",
        seed=rng.randrange(1000),
        pace=Pace.REALTIME,
        on_idle=OnIdle.CONTINUE if goes_on else OnIdle.PAUSE,
        created_at=float(number),
    )
    cluster.store.directory.create(record)
    cluster.ledger.created(record, stops_idle=not goes_on)
    cluster.records.append(record)
    for copy in range(rng.choice([1, 1, 2])):
        viewer = Viewer(f"v{number}.{copy}", record.id)
        cluster.viewers.append(viewer)
        host = _person(cluster, viewer.name)
        host.run(people.view(cluster, viewer, host))
    host = _person(cluster, f"c{number}")
    host.run(people.switch(cluster, record, host))
    if rng.random() < plan.interrupted:
        host.run(people.interrupt(cluster, record, host))


def _person(cluster: Cluster, name: str) -> Host:
    host = Host(cluster.world, name)
    cluster.people.append(host)
    return host


def _trouble(cluster: Cluster) -> None:
    plan, world = cluster.plan, cluster.world
    at_s = plan.quiet_s
    while plan.faults_per_s:
        at_s += world.rng.expovariate(plan.faults_per_s)
        if at_s >= plan.troubled_s:
            return
        name = world.rng.choice(plan.faults)
        world.after(at_s, partial(faults.strike, cluster, name))


def _inspect(cluster: Cluster) -> None:
    """Nothing grows beyond its bounds."""
    for replica in cluster.replicas.values():
        excess = replica.excess()
        if excess is not None:
            cluster.ledger.breach(excess)
    cluster.world.after(INSPECTION_S, partial(_inspect, cluster))


def _settled(cluster: Cluster, before: dict[str, int], made: dict[str, int]) -> None:
    """Every session goes on, every log is whole, nobody is left behind."""
    plan, ledger = cluster.plan, cluster.ledger
    due = int(plan.peaceful_s / CHUNK_S) - 1
    for record in cluster.records:
        ledger.finished(record.id, cluster.store.directory.controls(record.id))
        book = ledger.books[record.id]
        came = len(book.published) - made[record.id]
        if book.state is SessionState.LIVE and not book.stops_idle and came < due:
            ledger.breach(f"{record.id} is stuck: only {came} chunks in peace")
    for viewer in cluster.viewers:
        came = viewer.next - before[viewer.name]
        if viewer.ended is None and came < due:
            ledger.breach(f"{viewer.name}: {viewer.session_id} is stuck: only {came} in peace")
        if plan.no_stall and viewer.worst_stall_s > 0:
            ledger.breach(f"{viewer.name}: stalled for {viewer.worst_stall_s:.2f} s")
    watched: Counter[str] = Counter()
    for router in cluster.routers:
        watched += router.watched()
    if sum(watched.values()) > sum(v.ended is None for v in cluster.viewers):
        ledger.breach(f"more pulls than viewers: {watched}")
    for replica in cluster.replicas.values():
        left = replica.left_behind(watched)
        if left is not None:
            ledger.breach(f"left behind: {left}")
