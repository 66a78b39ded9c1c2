import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_ray.errors import ConfigError
from echo_ray.session.capacity import free_slots, smoothed


@pytest.mark.parametrize(
    ("chunk_seconds", "sessions", "limit", "expected"),
    [
        (0.1, 0, 16, 6),
        (0.1, 4, 16, 2),
        (0.1, 9, 16, 0),
        (0.1, 1, 3, 2),
        (0.3, 0, 16, 2),
        (0.675, 0, 16, 1),
        (0.7, 0, 16, 1),
        (0.7, 1, 16, 0),
        (0.0, 0, 16, 1),
        (0.0, 1, 16, 0),
    ],
)
def test_slots_are_what_the_measured_time_leaves(chunk_seconds, sessions, limit, expected):
    found = free_slots(chunk_seconds=chunk_seconds, chunk_s=0.75, sessions=sessions, limit=limit)
    assert found == expected


@given(st.floats(1e-4, 10), st.floats(1e-2, 10), st.integers(1, 64))
def test_full_slots_fit_into_the_time_with_the_margin(chunk_seconds, chunk_s, limit):
    slots = free_slots(chunk_seconds=chunk_seconds, chunk_s=chunk_s, sessions=0, limit=limit)
    assert 1 <= slots <= limit
    assert (
        slots == 1
        or slots * chunk_seconds <= chunk_s * 0.9 * (1 + 1e-6) + 1e-8 * chunk_seconds * limit
    )


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("chunk_seconds", {"chunk_seconds": -1.0}),
        ("chunk_s", {"chunk_s": 0.0}),
        ("margin", {"margin": 1.0}),
    ],
)
def test_impossible_measurements_are_refused(name, values):
    given_values = {"chunk_seconds": 0.1, "chunk_s": 0.75, "sessions": 0, "limit": 4}
    with pytest.raises(ConfigError, match=f"^{name}:"):
        free_slots(**{**given_values, **values})


def test_the_mean_starts_at_the_first_measurement_and_follows_slowly():
    assert smoothed(0.0, 0.4) == 0.4
    assert smoothed(0.4, 1.4) == pytest.approx(0.5)
