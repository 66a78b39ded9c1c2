"""Gradients to weights: groups, clipping, the average, and the seam for many processes."""

from __future__ import annotations

import pytest
import torch
from small import small_preset
from training_rig import lively_model

from echo_ray.training.optimise import Average, Updater, split_parameters
from echo_ray.training.recipe import EmaSection, OptimizerSection
from echo_ray.training.video_model import VideoModel


@pytest.fixture
def model() -> VideoModel:
    return lively_model(small_preset())


def test_every_parameter_has_one_optimizer(model: VideoModel) -> None:
    matrices, rest = split_parameters(model.named_parameters())
    assert len(matrices) + len(rest) == len(list(model.parameters()))
    assert all(p.ndim == 2 for _, p in matrices)
    assert any(p is model.text.words.weight for _, p in rest)
    for kind, count in (("muon", 2), ("adamw", 1)):
        updater = Updater(model, OptimizerSection(kind=kind))
        assert len(updater.optimizers) == count
        held = [p for o in updater.optimizers for g in o.param_groups for p in g["params"]]
        assert {id(p) for p in held} == {id(p) for p in model.parameters()}
        assert len(held) == len(list(model.parameters()))


def test_the_memory_encoder_learns_at_its_own_rate(model: VideoModel) -> None:
    updater = Updater(model, OptimizerSection(kind="muon", lr=1e-3, memory_lr_scale=5.0))
    assert model.memory is not None
    own = {id(p) for p in model.memory.parameters()}
    for optimizer in updater.optimizers:
        rates = [g["lr"] for g in optimizer.param_groups]
        assert rates[1] == pytest.approx(5 * rates[0])
        assert {id(p) for p in optimizer.param_groups[1]["params"]} <= own


def test_clipping_can_leave_the_memory_encoder_alone(model: VideoModel) -> None:
    assert model.memory is not None
    for clip_memory in (True, False):
        section = OptimizerSection(lr=1e-9, clip=1e-3, clip_memory=clip_memory)
        loss = sum(1000 * p.sum() for p in model.parameters())
        Updater(model, section).step(loss)  # type: ignore[arg-type]
        assert float(model.dit.head.head.weight.grad.norm()) < 1e-3
        grad = model.memory.query_init.grad
        assert grad is not None
        assert (float(grad.abs().max()) == 1000) is not clip_memory


def test_the_average_begins_late_and_then_follows_slowly(model: VideoModel) -> None:
    average = Average(model, EmaSection(decay=0.5, start=2))
    bias, held = model.dit.head.head.bias, average.model.dit.head.head.bias
    seen = []
    with torch.no_grad():
        for value in (1.0, 2.0, 4.0):
            bias.fill_(value)
            average.follow(model)
            seen.append(float(held[0]))
    assert seen[:2] == [1.0, 2.0]
    assert seen[2] == pytest.approx(2 + 2 * (1 - 1 / 11))
