"""The model that sees whole clips: equal to the transformer that serves, over a plain view."""

from __future__ import annotations

import torch
from small import small_preset
from training_rig import lively_model, losses_of, small_stage

from echo_kernels import Slots
from echo_ray.model.rope import FrameRope
from echo_ray.training.loop import step_random
from echo_ray.training.teacher import clip_levels, whole_clip_flow


class WholeClip:
    """All frames of a clip as one call without any past (a `KVCall`)."""

    def __init__(self, frames: int, batch: int) -> None:
        self.rope = FrameRope(2, 2, 8, "cpu").table(tuple(range(frames)))
        self.shape = (batch, self.rope.shape[0], 2, 8)

    def slots(self, layer: int) -> Slots:
        raw, keys, values = (torch.full(self.shape, torch.nan) for _ in range(3))
        return Slots(self.rope, self.rope, raw, keys, values, keys, values)


def test_a_whole_clip_is_one_pass_of_the_transformer_that_serves() -> None:
    preset = small_preset()
    model = lively_model(preset, with_memory=False)
    x = torch.randn(2, 12, 4, 4, 4)
    sigma = torch.tensor([0.3, 0.9])
    ids = torch.randint(1, 20, (2, 1, 6))
    with torch.no_grad():
        found = whole_clip_flow(model, x, sigma, ids.expand(-1, 4, -1))
        time = model.dit.condition((1000 * sigma)[:, None].expand(-1, 12))
        prompt = model.dit.encode_prompt(model.text(ids[:, 0]))
        expected = model.dit(x, model.dit.modulations(time), prompt, WholeClip(12, batch=2))
    assert torch.allclose(found, expected, atol=1e-5)


def test_every_chunk_reads_its_own_caption_and_sees_all_others() -> None:
    """With no self-attention, a chunk's flow depends on its own caption only."""
    preset = small_preset()
    model = lively_model(preset, with_memory=False)
    x, sigma = torch.randn(1, 12, 4, 4, 4), torch.tensor([0.5])
    ids = torch.randint(1, 20, (1, 4, 6))
    other = ids.clone()
    other[0, 2] = torch.tensor([9, 8, 7, 6, 5, 4])

    def changed() -> list[bool]:
        with torch.no_grad():
            difference = whole_clip_flow(model, x, sigma, ids) - whole_clip_flow(
                model, x, sigma, other
            )
        return [bool(d.abs().max() > 1e-6) for d in difference.chunk(4, dim=1)]

    assert changed() == [True] * 4
    for block in model.dit.blocks:
        block.self_attn.o.weight.data.zero_()
    assert changed() == [False, False, True, False]


def test_levels_are_even_in_time_and_shifted_as_the_sampler() -> None:
    level = clip_levels(4000, 5.0, step_random(7, "rig", 0))
    assert bool((level > 0).all())
    assert bool((level < 1).all())
    # Half of the timesteps lie above 5 * 0.5 / (1 + 4 * 0.5).
    assert abs(float((level > 5 / 6).float().mean()) - 0.5) < 0.03


def test_the_teacher_learns_a_batch() -> None:
    losses = losses_of(small_stage("teacher", teacher={"chunks": 4}, optimizer={"lr": 1e-2}), 15)
    assert losses[-1] < 0.9 * losses[0]


def test_some_clips_lose_their_caption() -> None:
    seen = []
    stage = small_stage("teacher", teacher={"chunks": 4, "batch": 4, "drop_caption": 0.5})
    stage.model.text.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for n in range(4):
        stage.train_step(step_random(7, "rig", n), 0.5)
    empty = torch.stack([ids.view(4, 4, 6).eq(0).flatten(1).all(dim=1) for ids in seen])
    assert 0.2 < float(empty.float().mean()) < 0.8
