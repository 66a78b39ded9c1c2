"""The stages in which the student makes its own past: what they learn, and from what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_rig import CPU, losses_of, small_bank, small_stage

from echo_ray.errors import ConfigError, WeightsError
from echo_ray.training.bank import take
from echo_ray.training.budget import Budget
from echo_ray.training.loop import run_stage, step_random
from echo_ray.training.rollout import Chunk, Rollout
from echo_ray.training.video_model import VideoModel, chunk_prompt

FAST = {"lr": 1e-2}
DMD = {"rollout": {"objective": "dmd"}, "dmd": {"teacher": "nowhere", "ratio": 2}}
STREAM = {"streaming": {"clip_chunks": 5, "overlap_chunks": 1}}


def change(critic: VideoModel) -> None:
    """Another score than the teacher's: as long as they are equal, there is nothing to follow."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in critic.dit.head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def memory_gradients(model: VideoModel) -> dict[str, float]:
    assert model.memory is not None
    return {
        name: 0.0 if p.grad is None else float(p.grad.abs().sum())
        for name, p in model.memory.named_parameters()
    }


def test_fewstep_learns_a_batch_by_regression() -> None:
    losses = losses_of(small_stage("fewstep", fewstep={"chunks": 5}, optimizer=FAST), 12)
    assert losses[-1] < 0.9 * losses[0]


def test_streaming_learns_a_batch_by_regression() -> None:
    """The same first clips again and again: a stream is given up before each step."""
    stage = small_stage("streaming", 5, optimizer=FAST, **STREAM)
    losses = losses_of(stage, 12)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("stage", ["fewstep", "streaming"])
@pytest.mark.parametrize("objective", [{}, DMD])
def test_the_gradient_reaches_the_memory_encoder(stage: str, objective: dict[str, Any]) -> None:
    section = {"chunks": 8} if stage == "fewstep" else {"clip_chunks": 8}
    made = small_stage(stage, 8, **{stage: section}, **objective)
    if made.dmd is not None:
        change(made.dmd.critic)
    losses_of(made, 1)
    found = memory_gradients(made.model)
    assert found["query_init"] > 0
    assert found["gate_linear.weight"] > 0
    assert found["to_k.weight"] > 0


def test_the_state_of_streams_is_cut_off_at_every_clip() -> None:
    stage = small_stage("streaming", 20, **STREAM)
    losses_of(stage, 1)
    assert stage.rollout.next_chunk == 5
    cache = stage.rollout.cache
    kept = [cache.sink, *cache.local]
    assert not any(t.requires_grad for chunk in kept for pair in chunk for t in pair)
    assert not cache.memory_state.requires_grad
    assert memory_gradients(stage.model)["query_init"] > 0
    losses_of(stage, 1)
    assert stage.rollout.next_chunk == 9
    # The initial queries went into the memory in the first clip, which is out of reach by now.
    found = memory_gradients(stage.model)
    assert found["query_init"] == 0
    assert found["to_k.weight"] > 0


def test_gradients_flow_through_as_many_clips_as_asked_for() -> None:
    section = {"clip_chunks": 5, "overlap_chunks": 0, "bptt_clips": 2}
    stage = small_stage("streaming", 20, streaming=section)
    losses_of(stage, 1)
    assert stage.rollout.next_chunk == 10
    stage = small_stage("streaming", 20, streaming=section)
    random = step_random(7, "rig", 0)
    _, second = stage._next_clip(random), stage._next_clip(random)
    # Only the first clip's last chunk reads the initial queries.
    (grad,) = torch.autograd.grad(second.loss, stage.model.memory.query_init)
    assert grad.abs().sum() > 0


def test_a_clip_is_judged_with_what_came_before_but_learns_from_its_new_chunks_only() -> None:
    stage = small_stage("streaming", 20, **STREAM, **DMD)
    losses_of(stage, 1)
    rolled = stage._next_clip(step_random(7, "rig", 0))
    assert rolled.latents_BFCHW.shape[1] == 15
    assert rolled.ids_BKP.shape[1] == 5
    assert rolled.fresh == 12
    before = rolled.latents_BFCHW[:, :3].detach()
    assert torch.equal(before, stage.rollout.history[:, :0].new_tensor(before.tolist()))
    total = stage.dmd.student_loss(
        rolled.latents_BFCHW, rolled.ids_BKP, rolled.fresh, step_random(7, "rig", 1)
    )
    (grad,) = torch.autograd.grad(total, rolled.latents_BFCHW)
    assert not grad[:, :3].any()
    assert grad[:, 3:].any()


def test_streams_begin_anew_when_their_clips_are_used_up() -> None:
    stage = small_stage("streaming", 9, **STREAM)
    seen = []
    for n in range(4):
        stage.train_step(step_random(7, "rig", n), 0.5)
        seen.append(stage.rollout.next_chunk)
    assert seen == [5, 9, 5, 9]


def test_scores_take_turns_and_the_critic_learns_in_every_step() -> None:
    stage = small_stage("fewstep", optimizer=FAST, **DMD)
    before = [p.clone() for p in stage.model.parameters()]
    teacher = [p.clone() for p in stage.dmd.teacher.parameters()]
    losses = stage.train_step(step_random(7, "rig", 1), 0.5)
    assert set(losses) == {"critic"}
    assert all(torch.equal(a, b) for a, b in zip(before, stage.model.parameters(), strict=True))
    losses = stage.train_step(step_random(7, "rig", 2), 0.5)
    assert set(losses) == {"student", "critic"}
    assert any(not torch.equal(a, b) for a, b in zip(before, stage.model.parameters(), strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(teacher, stage.dmd.teacher.parameters(), strict=True)
    )


def test_the_critic_learns_the_score_of_what_the_student_makes() -> None:
    section = DMD | {"dmd": {"teacher": "nowhere", "ratio": 1000, "critic": FAST}}
    stage = small_stage("fewstep", **section)
    assert stage.learns(step_random(7, "rig", 1)) is False
    found = [stage.train_step(step_random(7, "rig", 1), 0.5)["critic"] for _ in range(12)]
    assert found[-1] < 0.9 * found[0]


def test_equal_scores_give_no_gradient_and_guidance_does() -> None:
    stage = small_stage("fewstep", **DMD)
    bank, random = small_bank(6), lambda: step_random(7, "rig", 0)
    x = bank.latents_SFChw[:2].float()
    ids = bank.ids_SKL[:2].long()
    assert float(stage.dmd.student_loss(x, ids, 18, random())) == 0
    guided = small_stage(
        "fewstep", rollout={"objective": "dmd"}, dmd={"teacher": "nowhere", "guidance": 3.0}
    )
    assert float(guided.dmd.student_loss(x, ids, 18, random())) > 0


def test_the_students_gradient_is_the_normalised_difference_of_the_scores() -> None:
    stage = small_stage("fewstep", **DMD)
    change(stage.dmd.critic)
    bank = small_bank(6)
    ids = bank.ids_SKL[:2].long()
    x = bank.latents_SFChw[:2].float().requires_grad_()
    loss = stage.dmd.student_loss(x, ids, 18, step_random(7, "rig", 0))
    (grad,) = torch.autograd.grad(loss, x)
    with torch.no_grad():
        noisy, sigma, _ = stage.dmd._noised(x, step_random(7, "rig", 0))
        assert bool((sigma >= 0.02).all())
        assert bool((sigma <= 0.98).all())
        fake = stage.dmd._clean(stage.dmd.critic, noisy, sigma, ids)
        real = stage.dmd._clean(stage.dmd.teacher, noisy, sigma, ids)
        scale = (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    assert torch.allclose(grad * x.numel(), (fake - real) / scale, atol=1e-5)


def test_recipes_that_do_not_fit_their_bank_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"fewstep\.chunks: 10.*at most clips\.chunks \(6\)"):
        small_stage("fewstep", 6, fewstep={"chunks": 10})
    with pytest.raises(ConfigError, match=r"streaming\.clip_chunks"):
        small_stage("streaming", 6)
    with pytest.raises(ConfigError, match=r"at most the 3 chunks of the local window"):
        small_stage("streaming", 9, streaming={"clip_chunks": 8, "overlap_chunks": 4})
    with pytest.raises(ConfigError, match=r"pretrain\.short_chunks"):
        small_stage("pretrain", 4)
    with pytest.raises(ConfigError, match=r"teacher\.chunks"):
        small_stage("teacher", 6)


@pytest.mark.parametrize(("aligned_from", "own"), [(0, True), (9, False)])
def test_only_what_began_from_little_noise_becomes_context(
    monkeypatch: pytest.MonkeyPatch, aligned_from: int, own: bool
) -> None:
    rollout = {"own_share": 1.0, "aligned_from": aligned_from}
    stage = small_stage("fewstep", rollout=rollout)
    contexts: list[torch.Tensor] = []
    absorb = Rollout.absorb

    def spied(self: Rollout, chunk: Chunk, context: torch.Tensor) -> None:
        contexts.append(context)
        absorb(self, chunk, context)

    monkeypatch.setattr(Rollout, "absorb", spied)
    random = step_random(7, "fewstep", 0)
    picked = torch.from_numpy(
        step_random(7, "fewstep", 0).data.integers(len(stage.bank.ids_SKL), size=2)
    )
    truth = take(stage.bank, picked, range(stage.chunks), stage.frames, CPU).latents_BFChw
    stage.train_step(random, 0.0)
    for context, true in zip(contexts, truth.chunk(stage.chunks, dim=1), strict=True):
        assert torch.equal(context, true) != own


def test_some_rows_are_aligned_and_some_are_not() -> None:
    stage = small_stage("fewstep", rollout={"batch": 64, "aligned_from": 1, "lead_steps": 3})
    rollout = stage.new_rollout(64, step_random(7, "fewstep", 1))
    truth = torch.randn(64, 3, 4, 4, 4)
    ids = torch.ones(64, 6, dtype=torch.int64)
    prompt = chunk_prompt(stage.model.prompts(ids[:, None]), 64, 1, 0)
    chunk = Chunk(prompt, ids, torch.zeros(64, dtype=torch.bool))
    seen = set()
    for step in range(8):
        _, _, aligned = stage._towards(rollout, chunk, truth, step_random(7, "fewstep", step))
        seen |= set(aligned.tolist())
    assert seen == {True, False}


@pytest.mark.parametrize(("left", "going_on"), [({}, DMD), (DMD, {})])
def test_one_objective_does_not_go_on_where_another_stopped(
    left: dict[str, Any], going_on: dict[str, Any], tmp_path: Path
) -> None:
    budget, named = Budget(steps=1), {"seed": 7, "out": tmp_path, "checkpoint_every_s": 1e9}
    run_stage(small_stage("fewstep", **left), budget, resume=False, **named)
    with pytest.raises(WeightsError, match=r"another rollout\.objective.*run\.folder"):
        run_stage(small_stage("fewstep", **going_on), budget, resume=True, **named)
