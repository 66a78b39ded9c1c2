"""Training on a second device without one: on `meta` a tensor from elsewhere is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training_rig import small_stage

from echo_ray.training.bank import take
from echo_ray.training.loop import step_random
from echo_ray.training.rollout import Chunk, Rollout
from echo_ray.training.teacher import whole_clip_flow

META = torch.device("meta")
DMD = {"rollout": {"objective": "dmd"}, "dmd": {"teacher": "nowhere"}}


def moved(name: str, **sections: Any) -> Any:
    """A stage whose models are on `meta`; captions cannot be compared there, so rows never do."""
    stage = small_stage(name, 6, **sections)
    stage.device = META
    stage.model.to(META)
    if getattr(stage, "dmd", None):
        stage.dmd.critic.to(META)
        stage.dmd.teacher.to(META)
    return stage


def test_pretraining_stays_on_its_device() -> None:
    section = {"short_chunks": 3, "rebuild_share": 1.0, "fast_forward": 3, "hide_memory": 0.0}
    stage = moved("pretrain", pretrain=section)
    clips = take(stage.bank, torch.tensor([0, 1]), range(6), 3, META)
    loss = stage.clip_loss(clips, step_random(7, "rig", 0))
    loss.backward()
    assert loss.device == META
    assert stage.model.memory.query_init.grad.device == META


@pytest.mark.parametrize("sections", [{"rollout": {"fast_forward": 3, "context_noise": 0.1}}, DMD])
def test_rollouts_and_scores_stay_on_their_device(
    sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unchanged(self: Rollout, chunk: Chunk) -> None:
        assert chunk.ids_BP.device == META

    monkeypatch.setattr(Rollout, "_recache_changed", unchanged)
    stage = moved("fewstep", **sections)
    random = step_random(7, "rig", 0)
    clips = take(stage.bank, torch.tensor([0, 1]), range(6), 3, META)
    rollout = stage.new_rollout(2, random)
    rolled = stage.roll(rollout, clips, random)
    assert rolled.latents_BFCHW.device == META
    assert rollout.history.device == META
    loss = rolled.loss
    if stage.dmd is not None:
        judged = rolled.latents_BFCHW, rolled.ids_BKP, rolled.fresh, random
        assert stage.dmd.critic_loss(*judged).device == META
        loss = stage.dmd.student_loss(*judged)
    loss.backward()
    assert stage.model.memory.query_init.grad.device == META
    rollout.detach()
    again = stage.new_rollout(2, random)
    again.restore(rollout.state())
    assert again.cache.memory_state.device == META


def test_the_teacher_stays_on_its_device() -> None:
    stage = moved("teacher", teacher={"chunks": 4})
    x = torch.zeros(2, 12, 4, 4, 4, device=META)
    ids = torch.zeros(2, 4, 6, dtype=torch.int64, device=META)
    assert whole_clip_flow(stage.model, x, torch.ones(2, device=META), ids).device == META
