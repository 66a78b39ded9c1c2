"""What a client may ask for, field by field."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_ray.config import LimitsSection
from echo_ray.errors import InvalidRequestError, ModelUnknown, PromptError, SegmentBeyondEnd
from echo_ray.session import rules
from echo_ray.session.records import OnIdle, Pace

LIMITS = LimitsSection(prompt_chars=20, label_count=2, label_chars=5)


def make(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "new_id": "ses_x",
        "prompt": "red",
        "seed": 1,
        "model": None,
        "served_model": "m",
        "limits": LIMITS,
        "now": 5.0,
    }
    return rules.new_session(**{**fields, **changes})


def test_a_new_session_has_the_defaults() -> None:
    record = make()
    assert (record.model, record.pace, record.on_idle) == ("m", Pace.REALTIME, OnIdle.PAUSE)
    assert (record.epoch, record.next_index, record.owner) == (0, 0, None)
    assert record.created_at == 5.0
    assert make(model="m", pace="max", on_idle="close", labels={"a": "b"}).labels == {"a": "b"}


@pytest.mark.parametrize(
    "prompt",
    ["", "  \n", "a" * 21, "a\x00", "a\x1b[0m", "a\x7f", "a\x85", "a\ud800", None, 5, b"a"],
)
def test_a_prompt_that_no_model_can_be_asked_is_refused(prompt: object) -> None:
    with pytest.raises(PromptError) as caught:
        make(prompt=prompt)
    assert caught.value.param == "prompt"
    caught.value.message.encode()


@pytest.mark.parametrize("prompt", ["a", "a" * 20, "two\nlines\there", "äöü 🟥"])
def test_a_prompt_may_be_any_text(prompt: str) -> None:
    assert make(prompt=prompt).prompt == prompt


@pytest.mark.parametrize("seed", [-1, 2**63, 10**100, True, 1.0, "1", None])
def test_a_seed_out_of_range_is_refused(seed: object) -> None:
    with pytest.raises(InvalidRequestError, match="seed"):
        make(seed=seed)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_the_range_of_seeds_includes_its_ends(seed: int) -> None:
    assert make(seed=seed).seed == seed


@pytest.mark.parametrize(
    "labels",
    [
        {"a": "1", "b": "2", "c": "3"},
        {"toolong": "1"},
        {"a": "toolong"},
        {"": "1"},
        {"a": 1},
        {1: "a"},
        {"a\n": "1"},
        {"a": "\x00"},
        ["a"],
        "a",
    ],
)
def test_labels_beyond_the_limits_are_refused(labels: object) -> None:
    with pytest.raises(InvalidRequestError, match="labels"):
        make(labels=labels)


@pytest.mark.parametrize(
    "change", [{"pace": "slow"}, {"on_idle": 1}, {"pace": None}, {"on_idle": "PAUSE"}]
)
def test_a_word_that_is_none_of_the_choices_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(change))):
        make(**change)


def test_another_model_is_refused_and_the_served_one_is_named() -> None:
    with pytest.raises(ModelUnknown, match="served: m"):
        make(model="other")


@pytest.mark.parametrize("event_id", ["", "a" * 129, "a\n", "a\x00", "\ud800", 5, None])
def test_an_event_id_is_short_and_printable(event_id: object) -> None:
    with pytest.raises(InvalidRequestError, match="event_id"):
        rules.check_event_id(event_id)
    assert rules.check_event_id("a" * 128) == "a" * 128


def test_a_start_is_the_live_edge_a_past_index_or_refused() -> None:
    assert rules.check_start(None, 7) == 7
    assert rules.check_start(0, 7) == 0
    assert rules.check_start(7, 7) == 7
    with pytest.raises(SegmentBeyondEnd, match="next chunk is 7"):
        rules.check_start(8, 7)
    with pytest.raises(InvalidRequestError, match="negative"):
        rules.check_start(-1, 7)


def test_session_ids_are_plain_words() -> None:
    made = rules.session_id(bytes(range(10)))
    assert made == "ses_aaaqeayeaudaocaj"
    with pytest.raises(ValueError, match="3 random bytes"):
        rules.session_id(b"abc")


@given(st.binary(min_size=10, max_size=10), st.binary(min_size=10, max_size=10))
def test_different_bytes_give_different_ids(one: bytes, two: bytes) -> None:
    assert (rules.session_id(one) == rules.session_id(two)) == (one == two)


@given(st.one_of(st.none(), st.integers(), st.floats(), st.text(), st.lists(st.integers())))
def test_any_value_for_any_field_is_taken_or_refused_in_words(value: object) -> None:
    for field in ("prompt", "seed", "pace", "on_idle", "labels", "model"):
        refused = None
        try:
            make(**{field: value})
        except InvalidRequestError as e:
            refused = e
        if refused is not None:
            assert refused.param == field
            refused.message.encode()
