from echo_ray.session.lease import LeaseView
from echo_ray.session.records import Lease


def view(sent_s=100.0, ttl_s=2.0):
    return LeaseView(Lease("s1", "r1", 3), ttl_s, sent_s)


def test_a_lease_counts_from_before_the_renewal_was_sent_and_ends_early():
    lease = view()
    assert lease.valid(100.0)
    assert lease.valid(101.79)
    assert not lease.valid(101.8)
    # The store counts its ttl from some moment after the sending: it is always later.
    assert lease.valid_until_s < 100.0 + 2.0


def test_a_process_that_was_stopped_finds_its_lease_gone():
    assert not view().valid(100.0 + 3600)


def test_a_renewal_moves_the_end_and_an_older_answer_does_not_move_it_back():
    lease = view().renewed(101.0)
    assert lease.valid(102.79)
    assert not lease.valid(102.8)
    assert lease.renewed(100.5) == lease


def test_the_next_renewal_is_due_after_the_interval():
    assert view().renew_at_s(0.25) == 100.25
