"""What a state takes in memory, read from its tensors."""

from __future__ import annotations

import torch
from small import small_engine

from echo_ray.engine.footprint import device_memory, state_bytes


def test_the_state_of_an_endless_stream_stops_growing() -> None:
    engine = small_engine()
    state = engine.open("a red circle", 3)
    sizes = []
    for _ in range(14):
        engine.step(state)
        sizes.append(engine.state_bytes(state))
    assert sizes[-1] >= sizes[0] > 10_000
    assert len(set(sizes[-4:])) == 1


def test_what_is_shared_counts_once() -> None:
    numbers = torch.zeros(100, dtype=torch.float32)
    assert state_bytes({"a": numbers, "b": [numbers[:10], (numbers.view(10, 10),)]}) == 400
    assert state_bytes({"a": None, "b": "text"}) == 0


def test_a_cpu_says_what_the_process_takes() -> None:
    kinds = device_memory(torch.device("cpu"))
    assert set(kinds) == {"resident"}
    assert kinds["resident"] > 10**7
