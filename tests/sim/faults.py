"""What goes wrong, by name, and how all of it is put right again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from sim.kernel import Host, Process, Sleep
from sim.network import Weather
from sim.replica import Replica
from sim.router import Router

from echo_ray.errors import EchoError

if TYPE_CHECKING:
    from sim.scenario import Cluster

DRAIN_S = 8.0
"""A drained replica's deadline."""


def strike(cluster: Cluster, name: str) -> None:
    """Let the fault of that name happen."""
    cluster.faults[name] += 1
    FAULTS[name](cluster)


def heal(cluster: Cluster) -> None:
    """Everything runs, reaches everything, and does what it is asked to."""
    cluster.network.mend()
    store = cluster.store
    store.refusing = 0.0
    hosts = [cluster.store.host, *_hosts(cluster)]
    for host in hosts:
        host.slow, host.lag_s = 1.0, 0.0
        host.wake(host.life)
    for replica in cluster.replicas.values():
        replica.bench.failing = 0
        if replica.draining:
            _crash(replica)
        begin(replica)
    for router in cluster.routers:
        begin(router)


def begin(process: Replica | Router) -> None:
    """Start a process that is down."""
    if not process.host.up:
        process.host.start()
        process.start()


def _hosts(cluster: Cluster) -> list[Host]:
    return [p.host for p in (*cluster.replicas.values(), *cluster.routers)]


def _replica(cluster: Cluster) -> Replica:
    return cluster.world.rng.choice(list(cluster.replicas.values()))


def _crash(process: Replica | Router, *, silent: bool = False) -> None:
    if process.host.up:
        process.host.crash(silent=silent)


def _kill(cluster: Cluster, process: Replica | Router, *, silent: bool) -> None:
    if process.host.up:
        _crash(process, silent=silent)
        cluster.world.after(cluster.world.rng.uniform(0.3, 5), partial(begin, process))


def _kill_replica(cluster: Cluster) -> None:
    _kill(cluster, _replica(cluster), silent=False)


def _lose_node(cluster: Cluster) -> None:
    _kill(cluster, _replica(cluster), silent=True)


def _kill_router(cluster: Cluster) -> None:
    rng = cluster.world.rng
    _kill(cluster, rng.choice(cluster.routers), silent=rng.random() < 0.3)


def _stop_replica(cluster: Cluster) -> None:
    _replica(cluster).host.stop(cluster.world.rng.uniform(0.05, 6))


def _stop_router(cluster: Cluster) -> None:
    rng = cluster.world.rng
    rng.choice(cluster.routers).host.stop(rng.uniform(0.05, 3))


def _slow(cluster: Cluster) -> None:
    world = cluster.world
    host = world.rng.choice(_hosts(cluster))
    host.slow, host.lag_s = world.rng.uniform(2, 15), world.rng.uniform(0, 0.3)
    world.note("{} becomes slow", host.name)

    def over() -> None:
        host.slow, host.lag_s = 1.0, 0.0

    world.after(world.rng.uniform(0.5, 5), over)


def _cut(cluster: Cluster) -> None:
    rng = cluster.world.rng
    one, other = rng.sample([*_hosts(cluster), cluster.store.host, *cluster.people], 2)
    cluster.network.cut(one, other, rng.uniform(0.1, 5))


def _isolate(cluster: Cluster) -> None:
    """A process is cut off from all others, or from all but the store."""
    rng = cluster.world.rng
    alone, seconds = rng.choice(_hosts(cluster)), rng.uniform(0.3, 5)
    others = [*_hosts(cluster), *cluster.people]
    if rng.random() < 0.5:
        others.append(cluster.store.host)
    for host in others:
        if host is not alone:
            cluster.network.cut(alone, host, seconds)


def _weather(cluster: Cluster) -> None:
    """For a while messages are lost, late and doubled."""
    world, rng, network = cluster.world, cluster.world.rng, cluster.network
    network.weather = Weather(
        slow=rng.choice([0.01, 0.2]),
        late=rng.choice([0.0, 0.05, 0.2]),
        lost=rng.choice([0.0, 0.02, 0.2]),
        twice=rng.choice([0.0, 0.1]),
    )
    world.note("{}", network.weather)

    def over() -> None:
        network.weather = Weather()

    world.after(rng.uniform(0.5, 5), over)


def _refuse(cluster: Cluster) -> None:
    """The store answers with errors, always or now and then."""
    store, world = cluster.store, cluster.world
    store.refusing = world.rng.choice([0.1, 0.5, 1.0])
    world.note("the store refuses {} of all calls", store.refusing)

    def over() -> None:
        store.refusing = 0.0

    world.after(world.rng.uniform(0.1, 3), over)


def _stop_store(cluster: Cluster) -> None:
    cluster.store.host.stop(cluster.world.rng.uniform(0.05, 2))


def _lose_blob(cluster: Cluster) -> None:
    """A snapshot's bytes are gone, as in a tier that forgot them; its reference stands."""
    blobs = cluster.store.blobs
    if blobs:
        name = cluster.world.rng.choice(list(blobs))
        del blobs[name]
        cluster.world.note("blob {} is lost", name)


def _set_clock(cluster: Cluster) -> None:
    """Somebody's wall clock jumps."""
    rng = cluster.world.rng
    host = rng.choice([cluster.store.host, *_hosts(cluster)])
    host.skew_s = rng.uniform(-1, 1) * cluster.plan.skew_s
    cluster.world.note("{}'s clock is {:.2f} s off", host.name, host.skew_s)


def _spoil(cluster: Cluster) -> None:
    _replica(cluster).bench.failing = cluster.world.rng.choice([1, 1, 2, 6])


def _give_up(cluster: Cluster) -> None:
    """A replica has to go at once, without time to move anything."""
    replica = _replica(cluster)
    if replica.host.up and not replica.draining:
        cluster.world.note("{} gives everything up", replica.id)
        replica.drain()
        life, seconds = replica.host.life, cluster.world.rng.uniform(0.5, 3)
        cluster.world.after(seconds, partial(_leave, cluster, replica, life))


def _leave(cluster: Cluster, replica: Replica, life: int) -> None:
    """The process ends; another one comes in its place, soon or when all is well again."""
    if replica.host.up and replica.host.life == life:
        _crash(replica)
        if cluster.world.rng.random() < 0.7:
            cluster.world.after(cluster.world.rng.uniform(0.3, 4), partial(begin, replica))


def _move(cluster: Cluster) -> None:
    """A session moves while all goes on: to the best replica, or to one that is named."""
    rng = cluster.world.rng
    router = rng.choice(cluster.routers)
    to = _replica(cluster).id if rng.random() < 0.3 else None
    session_id = rng.choice(cluster.records).id
    if router.host.up:
        cluster.world.note("{} is to move to {}", session_id, to)
        router.host.run(_try_to_move(router, session_id, to))


def _try_to_move(router: Router, session_id: str, to: str | None) -> Process:
    try:
        yield from router.migrate(session_id, to)
    except EchoError as error:
        router.host.world.note("{} is not moved: {}", session_id, error.message)


def _drain(cluster: Cluster) -> None:
    """A replica is emptied by moves, then ends: scale-down, or an upgrade."""
    replica, router = _replica(cluster), cluster.world.rng.choice(cluster.routers)
    if replica.host.up and router.host.up and not replica.draining:
        replica.draining = True
        cluster.world.note("{} is drained by {}", replica.id, router.host.name)
        router.host.run(_empty(cluster, router, replica, replica.host.life))
        cluster.world.after(DRAIN_S + 1, partial(_leave, cluster, replica, replica.host.life))


def _empty(cluster: Cluster, router: Router, replica: Replica, life: int) -> Process:
    until_s = router.host.monotonic() + DRAIN_S
    while replica.host.life == life and router.host.monotonic() < until_s:
        owned = [s for s in replica.seats if not s.now.shadow and s.now.ended is None]
        if not owned:
            break
        for seat in owned:
            yield from _try_to_move(router, seat.record.id, None)
        yield Sleep(0.5)
    if replica.host.life == life:
        replica.drain()
        yield Sleep(0.5)
        _leave(cluster, replica, life)


FAULTS: dict[str, Callable[[Cluster], None]] = {
    "replica killed": _kill_replica,
    "node lost": _lose_node,
    "replica stopped": _stop_replica,
    "replica gives up": _give_up,
    "router killed": _kill_router,
    "router stopped": _stop_router,
    "process slow": _slow,
    "link cut": _cut,
    "process isolated": _isolate,
    "bad weather": _weather,
    "store refuses": _refuse,
    "store stopped": _stop_store,
    "blob lost": _lose_blob,
    "clock set": _set_clock,
    "engine fails": _spoil,
    "session moved": _move,
    "replica drained": _drain,
}
PLANNED = ("session moved", "replica drained")
"""What no viewer may notice."""
