from echo_ray.session.demand import KEPT_S, LATELY_S, Demand, Refusals, heard, together, total
from echo_ray.session.draining import Reason
from echo_ray.session.figures import figures, read, standing
from echo_ray.session.fingerprint import ResumePolicy
from echo_ray.session.records import ReplicaRecord
from echo_ray.session.scaling import Leaving, Standing


def test_what_one_router_sees_is_summed_and_what_all_read_counts_once():
    told = heard({}, "a", Demand(watched=1, unwatched=4, refused=2, draining=1, moving=3), 0.0)
    told = heard(told, "b", Demand(watched=2, unwatched=5, refused=3, draining=2, moving=6), 1.0)
    assert total(told, 1.0) == Demand(watched=3, unwatched=5, refused=5, draining=2, moving=6)
    assert Demand(watched=3, unwatched=5).waiting == 8


def test_a_router_that_is_not_heard_any_more_is_forgotten():
    told = heard(heard({}, "a", Demand(watched=1), 0.0), "a", Demand(watched=2), 1.0)
    assert total(told, KEPT_S) == Demand(watched=2)
    assert total(told, 1.0 + KEPT_S) is None
    assert set(heard(told, "b", Demand(), 1.0 + KEPT_S)) == {"b"}
    assert together([]) is None


def test_refusals_count_for_as_long_as_clients_are_asked_to_wait():
    refusals = Refusals()
    for at_s in (0.0, 1.0, 1.0):
        refusals.add(at_s)
    assert refusals.count(1.0) == 3
    assert refusals.count(LATELY_S) == 2
    assert refusals.count(1.0 + LATELY_S) == 0


def said(**more):
    options = {
        "leaving": None, "policy": ResumePolicy.EXACT, "slack_s": 1.5, "chunk_s": 0.5,
        "lead_chunks": 4, "limit": 16,
    }  # fmt: skip
    record = ReplicaRecord(
        id="r1", node_id="n", pid=1, address="a:1", sessions=("s1", "s2"), chunk_seconds=0.1,
        fingerprint="tiny/w/cpu",
    )  # fmt: skip
    return standing(record, **{**options, **more})


def test_a_replica_says_what_it_measured():
    found = said()
    assert (found.id, found.sessions, found.slots, found.slack_chunks) == ("r1", 2, 4, 3.0)
    assert said(slack_s=float("inf")).slack_chunks == 4.0
    assert said(limit=3).slots == 3
    leaving = {None: Leaving.NO, Reason.ADMIN: Leaving.KEPT}
    for reason in (None, *Reason):
        assert said(leaving=reason).leaving is leaving.get(reason, Leaving.REPLACED)


def test_kinds_are_who_may_go_on_with_each_others_sessions():
    other = ReplicaRecord(id="r2", node_id="n", pid=1, address="a:1", fingerprint="tiny/w/cuda")
    rest = {"leaving": None, "slack_s": 1.0, "chunk_s": 0.5, "lead_chunks": 4, "limit": 16}
    for policy, alike in ((ResumePolicy.EXACT, False), (ResumePolicy.COMPATIBLE, True)):
        assert (standing(other, policy=policy, **rest).kind == said(policy=policy).kind) is alike


def test_numbers_say_it_all_again():
    demand = Demand(watched=1, unwatched=2, refused=3, draining=4, moving=5)
    found = Standing(
        id="r1", sessions=2, slots=4, slack_chunks=2.5, leaving=Leaving.KEPT, kind=2**32 - 1
    )
    for told in (demand, Demand(), None):
        numbers = figures(found, told)
        assert all(type(value) is float for value in numbers.values())
        assert len(numbers) == 11
        assert read("r1", numbers) == (found, told)
