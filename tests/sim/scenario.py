"""One run: sessions and viewers on replicas and routers, faults for a while, then peace.

python -m sim.scenario SEED      (from tests/) prints the log of that seed
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from sim.kernel import Host, Network, Process, Sleep, World
from sim.ledger import Ledger
from sim.replica import Replica, Segment
from sim.router import Router, Viewer
from sim.store import Store
from sim.stream import CHUNK_S

from echo_ray.errors import EchoError
from echo_ray.session.records import OnIdle, Pace, SessionRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How large a world, and for how long."""

    replicas: int = 4
    routers: int = 2
    sessions: int = 6
    troubled_s: float = 30.0
    """Virtual seconds with faults."""
    peaceful_s: float = 20.0
    """And then without: everybody has to come back to life in them."""
    faults_per_s: float = 0.5
    skew_s: float = 0.2


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
    records: list[SessionRecord] = field(default_factory=list)
    faults: int = 0


def build(seed: int, plan: Plan) -> Cluster:
    """A cluster at rest."""
    world = World(seed)
    network, ledger = Network(world), Ledger(world)

    def host(name: str) -> Host:
        return Host(world, name, skew_s=world.rng.uniform(-plan.skew_s, plan.skew_s))

    store = Store(Host(world, "store"), network, ledger)
    replicas = {f"r{n}": Replica(host(f"r{n}"), store) for n in range(plan.replicas)}
    routers = [Router(host(f"t{n}"), network, store, replicas) for n in range(plan.routers)]
    for replica in replicas.values():
        replica.start()
    cluster = Cluster(plan, world, network, ledger, store, replicas, routers)
    for number in range(plan.sessions):
        _open(cluster, number)
    return cluster


def run(seed: int, plan: Plan) -> Cluster:
    """The whole run. Raises `Breach`, its log in `cluster.world.log`."""
    cluster = build(seed, plan)
    world = cluster.world
    try:
        _trouble(cluster)
        while world.step(plan.troubled_s):
            pass
        world.note("peace")
        _heal(cluster)
        before = {v.name: v.next for v in cluster.viewers}
        while world.step(plan.troubled_s + plan.peaceful_s):
            pass
        _settled(cluster, before)
    except BaseException as error:
        error.add_note(f"seed {seed}\n" + "\n".join(world.log[-60:]))
        raise
    return cluster


def _open(cluster: Cluster, number: int) -> None:
    rng = cluster.world.rng
    record = SessionRecord(
        id=f"s{number}",
        model="sim",
        prompt=f"prompt {number}",
        seed=rng.randrange(1000),
        pace=Pace.REALTIME,
        on_idle=rng.choice([OnIdle.PAUSE, OnIdle.CONTINUE]),
        created_at=float(number),
    )
    cluster.store.directory.create(record)
    cluster.ledger.created(record)
    cluster.records.append(record)
    for copy in range(rng.choice([1, 1, 2])):
        viewer = Viewer(f"v{number}.{copy}", record.id)
        cluster.viewers.append(viewer)
        host = Host(cluster.world, viewer.name)
        host.run(_view(cluster, viewer, host))
    host = Host(cluster.world, f"c{number}")
    host.run(_switch(cluster, record, host))


def _view(cluster: Cluster, viewer: Viewer, host: Host) -> Process:
    """A viewer stays with its router until that dies, then goes to another one."""
    rng = cluster.world.rng
    yield Sleep(rng.uniform(0, 3))
    while viewer.ended is None:
        router = rng.choice(cluster.routers)
        life = router.host.life
        if not router.host.up:
            yield Sleep(0.2)
            continue
        viewer.gone = False
        router.watch(viewer, partial(_taken, cluster, viewer))
        while viewer.ended is None and router.host.up and router.host.life == life:
            yield Sleep(0.3)


def _taken(cluster: Cluster, viewer: Viewer, segment: Segment) -> None:
    now_s = cluster.world.now_s
    cluster.ledger.delivered(
        viewer.session_id, viewer.name, segment.index, viewer.next, segment.digest
    )
    if viewer.playing_s is None:
        viewer.playing_s = now_s + 2.0 - CHUNK_S * segment.index
    late_s = now_s - (viewer.playing_s + CHUNK_S * segment.index)
    if late_s > 0:
        viewer.stalled_s += late_s
        viewer.playing_s += late_s
    viewer.next = segment.index + 1


def _switch(cluster: Cluster, record: SessionRecord, host: Host) -> Process:
    """Somebody who switches prompts, sure of nothing that is not acknowledged."""
    rng, number = cluster.world.rng, 0
    while True:
        yield Sleep(rng.uniform(0.5, 8))
        number += 1
        event_id, prompt = f"e{number}", f"switch {number}"
        for _ in range(20):
            try:
                entry = yield from cluster.store.append_control(
                    host, record.id, event_id, prompt, None
                )
            except EchoError:
                yield Sleep(rng.uniform(0.1, 0.5))
                continue
            cluster.ledger.acknowledged(record.id, entry)
            if rng.random() < 0.3:
                # The answer got lost on the way to the client, who asks again.
                continue
            break


# Faults


def _trouble(cluster: Cluster) -> None:
    plan, world = cluster.plan, cluster.world
    at_s = 3.0
    while True:
        at_s += world.rng.expovariate(plan.faults_per_s)
        if at_s >= plan.troubled_s:
            return
        fault = world.rng.choice(FAULTS)
        world.after(at_s, lambda fault=fault: _strike(cluster, fault))


def _strike(cluster: Cluster, fault: Callable[[Cluster], None]) -> None:
    cluster.faults += 1
    fault(cluster)


def _kill_replica(cluster: Cluster) -> None:
    _restart(cluster, cluster.world.rng.choice(list(cluster.replicas.values())))


def _restart(cluster: Cluster, replica: Replica) -> None:
    if not replica.host.up:
        return
    replica.host.crash(silent=cluster.world.rng.random() < 0.3)
    cluster.world.after(cluster.world.rng.uniform(0.5, 6), lambda: _begin(replica))


def _begin(replica: Replica) -> None:
    if not replica.host.up:
        replica.host.start()
        replica.start()


def _stop_replica(cluster: Cluster) -> None:
    rng = cluster.world.rng
    rng.choice(list(cluster.replicas.values())).host.stop(rng.uniform(0.05, 6))


def _kill_router(cluster: Cluster) -> None:
    rng = cluster.world.rng
    router = rng.choice(cluster.routers)
    if router.host.up:
        router.host.crash(silent=rng.random() < 0.3)
        cluster.world.after(rng.uniform(0.2, 3), lambda: _router_again(router))


def _router_again(router: Router) -> None:
    if not router.host.up:
        router.host.start()
        router.start()


def _stop_router(cluster: Cluster) -> None:
    rng = cluster.world.rng
    rng.choice(cluster.routers).host.stop(rng.uniform(0.05, 3))


def _cut(cluster: Cluster) -> None:
    rng = cluster.world.rng
    hosts = [r.host for r in cluster.replicas.values()] + [r.host for r in cluster.routers]
    one, other = rng.sample([*hosts, cluster.store.host], 2)
    cluster.network.cut(one, other, rng.uniform(0.1, 5))


def _refuse(cluster: Cluster) -> None:
    store, world = cluster.store, cluster.world
    store.refusing = True
    world.note("the store refuses")

    def over() -> None:
        store.refusing = False
        world.note("the store answers again")

    world.after(world.rng.uniform(0.1, 3), over)


def _drain(cluster: Cluster) -> None:
    rng = cluster.world.rng
    replica = rng.choice(list(cluster.replicas.values()))
    if replica.host.up and not replica.draining:
        cluster.world.note(f"{replica.id} drains")
        replica.drain()
        cluster.world.after(rng.uniform(1, 5), lambda: _restart(cluster, replica))


FAULTS = (
    _kill_replica,
    _stop_replica,
    _kill_router,
    _stop_router,
    _cut,
    _refuse,
    _drain,
)


# Peace


def _heal(cluster: Cluster) -> None:
    cluster.store.refusing = False
    for replica in cluster.replicas.values():
        _begin(replica)
        if replica.draining:
            _restart(cluster, replica)
    for router in cluster.routers:
        _router_again(router)


def _settled(cluster: Cluster, before: dict[str, int]) -> None:
    """Every viewer sees its session go on, and every log holds what was acknowledged."""
    for record in cluster.records:
        cluster.ledger.finished(record.id, cluster.store.directory.controls(record.id))
    for viewer in cluster.viewers:
        came = viewer.next - before[viewer.name]
        if came < 5:
            cluster.ledger.stuck(viewer.session_id, viewer.name, viewer.next, came)
