"""The simulation of a lost share of a cluster, in small: it measures what it says it does."""

from __future__ import annotations

from sim.scale import CALM_S, WATCHED_S, Arrivals, build, lose, report

from echo_ray.session.records import SessionState


def run(replica_us: float) -> tuple[Arrivals, set[str], str, float]:
    """32 sessions on two nodes, one of which goes, and the longest queue at the store."""
    cluster, load, nodes = build(3, 32, 16, replica_us)
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
    *_, quick_s = run(0.5)
    *_, slow_s = run(5_000.0)
    assert quick_s < 0.002
    assert slow_s > 0.05
