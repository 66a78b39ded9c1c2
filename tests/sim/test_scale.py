"""The simulation of a lost share of a cluster, in small: it measures what it says it does."""

from __future__ import annotations

from sim.scale import CALM_S, WATCHED_S, Arrivals, build, lose, report

from echo_ray.session.records import SessionState


def run(
    replica_us: float, *, sampled: bool = True, replicas: int = 16
) -> tuple[Arrivals, set[str], str, float]:
    """Two sessions a replica; half of the nodes go. And the longest queue at the store."""
    cluster, load, nodes = build(3, 2 * replicas, replicas, replica_us, sampled=sampled)
    cluster.world.run(CALM_S)
    loss = lose(cluster, nodes, 0.5)
    cluster.world.run(CALM_S + WATCHED_S)
    ledger = cluster.ledger
    assert isinstance(ledger, Arrivals)
    longest_s = max(load.waited_s.values())
    return ledger, loss.sessions, report(cluster, load, loss, 0.0), longest_s


def test_every_lost_stream_goes_on_elsewhere() -> None:
    ledger, lost, text, _ = run(0.5)
    assert len(lost) == 16
    assert lost <= ledger.made_s.keys()
    assert all(0.5 < ledger.made_s[s] < WATCHED_S for s in lost)
    assert ledger.first_s.keys() == {f"v{n}" for n in range(32)}
    assert all(book.state is SessionState.LIVE for book in ledger.books.values())
    (line,) = [part for part in text.splitlines() if part.startswith("lost owner, chunk committed")]
    assert "    16  median" in line


def test_a_slow_store_is_seen_to_queue() -> None:
    *_, quick_s = run(0.5, sampled=False)
    *_, slow_s = run(5_000.0, sampled=False)
    assert quick_s < 0.002
    assert slow_s > 0.05


def test_routers_need_not_read_all_replicas() -> None:
    ledger, lost, text, longest_s = run(5_000.0, replicas=64)
    assert len(lost) == 64
    assert lost <= ledger.made_s.keys()
    assert "all replicas 0 (0)" in text
    assert longest_s < 0.05
