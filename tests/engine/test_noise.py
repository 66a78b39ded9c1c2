"""Noise is a pure function of (seed, chunk, step)."""

from __future__ import annotations

import hashlib

import torch

from echo_ray.engine.noise import gaussian
from echo_ray.model.to_device import to_device


def test_the_same_counter_gives_the_same_bits_whatever_ran_before() -> None:
    first = gaussian(9, 4, 2, (3, 5, 7))
    for i in range(5):
        gaussian(i, i, i, (i + 1, 3))
        torch.randn(100)
    assert torch.equal(gaussian(9, 4, 2, (3, 5, 7)), first)


def test_seed_chunk_and_step_all_matter() -> None:
    draws = [gaussian(*k, (64,)) for k in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))]
    for i, a in enumerate(draws):
        for b in draws[i + 1 :]:
            assert (a == b).float().mean() < 0.1


def test_a_shorter_draw_is_not_a_prefix_trap() -> None:
    # Streams are drawn whole: nothing may depend on reading part of one.
    assert gaussian(1, 2, 3, (5,)).shape == (5,)
    assert gaussian(1, 2, 3, (0,)).numel() == 0


def test_values_are_standard_normal() -> None:
    x = gaussian(2**63 - 1, 10**9, 3, (200_000,)).double()
    assert abs(float(x.mean())) < 0.01
    assert abs(float(x.std()) - 1) < 0.01
    assert abs(float((x.abs() < 1).double().mean()) - 0.6827) < 0.005
    assert bool(torch.isfinite(x).all())


def test_the_bits_are_those_of_earlier_releases() -> None:
    # A change here would break every stored stream: raise CODE_EPOCH if it is meant.
    digest = hashlib.sha256(gaussian(7, 3, 1, (1000,)).numpy().tobytes()).hexdigest()
    assert digest == "c0418e047244ff6c6a82be98a8aabcb621baeb6b0d05cae6a63fc1074b5d0921"


def test_a_gpu_gets_pinned_memory_and_nobody_waits_for_it() -> None:
    said: list[object] = []

    class Host:
        def pin_memory(self) -> Host:
            said.append("pinned")
            return self

        def to(self, device: torch.device, *, non_blocking: bool = False) -> Host:
            said.append((device.type, non_blocking))
            return self

    to_device(Host(), torch.device("cuda"))  # type: ignore[arg-type]
    to_device(Host(), torch.device("meta"))  # type: ignore[arg-type]
    assert said == ["pinned", ("cuda", True), ("meta", False)]
