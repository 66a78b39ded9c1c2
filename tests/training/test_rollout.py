"""What the student makes in training is what the engine would serve, and where gradients flow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small import small_preset
from torch import Tensor
from training_rig import CPU, lively_model

from echo_ray.engine.generator import Generator
from echo_ray.errors import ConfigError
from echo_ray.preset import Preset
from echo_ray.training.rollout import Chunk, Lead, Rollout
from echo_ray.training.video_model import VideoModel

IDS = torch.tensor([[1, 2, 3, 0, 0, 0], [4, 2, 9, 5, 0, 0], [7, 2, 3, 0, 0, 0]])
STEPS = (1000, 750, 500, 250)


def noise(chunk: int, step: int, rows: int = 1) -> Tensor:
    source = torch.Generator().manual_seed(100 * chunk + step)
    return torch.randn(rows, 3, 4, 4, 4, generator=source)


def chunk_of(model: VideoModel, ids: Tensor, *, hidden: bool = False) -> Chunk:
    return Chunk(model.prompts(ids), ids, torch.full((len(ids),), hidden))


def sampled(kind: str, **cache: object) -> Preset:
    preset = small_preset(STEPS, **cache)
    return replace(preset, sampler=replace(preset.sampler, kind=kind))


def rolled(rollout: Rollout, model: VideoModel, ids: Tensor, exit_step: int = 3) -> Tensor:
    """One more chunk, which becomes its own context."""
    chunk, k = chunk_of(model, ids), rollout.next_chunk
    made = rollout.denoise(chunk, lambda step: noise(k, step, len(ids)), exit_step)
    rollout.absorb(chunk, made)
    return made


CASES = [
    ("euler", {}, (0,) * 10),
    ("renoise", {}, (0,) * 10),
    ("euler", {"point_every": 3}, (0, 0, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0, 1, 1)),
    ("renoise", {"recache": False}, (0, 1, 1, 1, 1, 1, 2, 2, 0, 0, 0, 0)),
    ("euler", {"policy": "window"}, (0, 0, 0, 1, 1, 1, 2, 2, 2)),
    ("renoise", {"policy": "absolute", "recache": False}, (0, 1, 1, 1, 1, 1, 2, 2, 0, 0, 0)),
    ("euler", {"policy": "absolute", "recache": False, "point_every": 3}, (0,) * 7 + (1,) * 5),
]


@pytest.mark.parametrize(("kind", "cache", "captions"), CASES)
def test_a_rollout_is_what_the_engine_makes_of_the_same_noise(
    kind: str, cache: dict[str, object], captions: tuple[int, ...]
) -> None:
    preset = sampled(kind, **cache)
    model = lively_model(preset)
    generator = Generator(model.dit, model.memory, preset.cache, preset.sampler)
    rollout = Rollout(preset, model, 1, CPU)
    with torch.no_grad():
        state = generator.start(model.text(IDS[captions[0]][None]))
        for k, caption in enumerate(captions):
            ids = IDS[caption][None]
            if k and captions[k - 1] != caption:
                generator.switch(state, model.text(ids))
            served = generator.generate(state, noise)
            made = rolled(rollout, model, ids)
            assert served.abs().max() > 1
            assert torch.allclose(made, served, atol=1e-5), f"chunk {k}"
    assert state.has_history == (rollout.cache.memory is not None) == (model.memory is not None)


def test_rows_switch_each_at_its_own_time() -> None:
    """A batch whose rows switch at different chunks is the rows, each by itself."""
    preset = sampled("euler")
    model = lively_model(preset)
    captions = [(0, 0, 0, 1, 1, 1, 1, 1), (2, 2, 2, 2, 2, 2, 0, 0)]
    together = Rollout(preset, model, 2, CPU)
    alone = [Rollout(preset, model, 1, CPU) for _ in captions]
    with torch.no_grad():
        for k in range(8):
            both = rolled(together, model, IDS[[row[k] for row in captions]])
            for row, rollout in enumerate(alone):
                chunk = chunk_of(model, IDS[captions[row][k]][None])
                made = rollout.denoise(
                    chunk, lambda s, row=row, k=k: noise(k, s, 2)[row : row + 1], 3
                )
                rollout.absorb(chunk, made)
                assert torch.allclose(both[row], made[0], atol=1e-5), f"row {row}, chunk {k}"


def test_only_the_step_that_is_trained_and_the_memory_have_a_gradient() -> None:
    preset = sampled("euler")
    model = lively_model(preset)
    rollout = Rollout(preset, model, 1, CPU)
    made = [rolled(rollout, model, IDS[:1], exit_step=1) for _ in range(6)]
    assert all(clean.requires_grad for clean in made)
    kept = [rollout.cache.sink, *rollout.cache.local]
    assert not any(t.requires_grad for chunk in kept for pair in chunk for t in pair)
    assert not rollout.history.requires_grad
    assert rollout.cache.memory_state is not None
    assert rollout.cache.memory_state.requires_grad
    assert model.memory is not None
    # Chunk 5's trained step reads what chunk 4 and 5 have written into the memory.
    grads = torch.autograd.grad(
        made[5].square().sum(),
        [model.memory.query_init, model.memory.gate_linear.weight, model.memory.to_k.weight],
    )
    assert all(g.abs().sum() > 0 for g in grads)


def test_the_first_step_sees_the_memory_as_it_was() -> None:
    preset = sampled("euler")
    model = lively_model(preset)
    rollout = Rollout(preset, model, 1, CPU)
    made = [rolled(rollout, model, IDS[:1], exit_step=0) for _ in range(6)]
    assert model.memory is not None
    query = model.memory.query_init
    # Chunk 4 is the first to evict, so its first step sees none; chunk 5's sees one update.
    early, late = (
        torch.autograd.grad(clean.sum(), query, allow_unused=True, retain_graph=True)[0]
        for clean in made[4:6]
    )
    assert early is None
    assert late is not None


def test_autocast_carries_no_weight_over_from_passes_without_gradient() -> None:
    preset = sampled("euler")
    model = lively_model(preset)
    with torch.autocast("cpu", torch.bfloat16):
        clean = rolled(Rollout(preset, model, 1, CPU), model, IDS[:1], exit_step=2)
    clean.square().sum().backward()
    silent = [n for n, p in model.dit.named_parameters() if p.grad is None]
    assert silent == []


def test_a_context_with_gradient_can_be_asked_for() -> None:
    preset = sampled("euler")
    model = lively_model(preset)
    rollout = Rollout(preset, model, 1, CPU, context_gradient=True)
    rolled(rollout, model, IDS[:1])
    assert rollout.cache.sink is not None
    assert rollout.cache.sink[-1][0].requires_grad


def test_a_chunk_may_begin_from_the_truth_in_each_row_at_its_own_step() -> None:
    preset = sampled("euler")
    model = lively_model(preset)
    ids, truth = IDS[:2], noise(50, 0, 2)
    draw = [noise(0, s, 2) for s in range(4)]
    with torch.no_grad():
        lead = Lead(truth, torch.tensor([2, 0]), 0)
        both = Rollout(preset, model, 2, CPU).denoise(
            chunk_of(model, ids), draw.__getitem__, 2, lead=lead
        )
        sigma = Rollout(preset, model, 1, CPU).schedule.sigmas[2]
        direct = Lead(truth[:1], torch.tensor([2]), 2)
        late = Rollout(preset, model, 1, CPU).denoise(
            chunk_of(model, ids[:1]), lambda s: draw[s][:1], 2, lead=direct
        )
        whole = Rollout(preset, model, 1, CPU).denoise(
            chunk_of(model, ids[1:]), lambda s: draw[s][1:], 2
        )
    assert 0 < sigma < 1
    assert torch.allclose(both[0], late[0], atol=1e-5)
    assert torch.allclose(both[1], whole[0], atol=1e-5)


def test_hidden_time_is_drawn_out_in_the_rows_where_nothing_was_seen() -> None:
    preset = sampled("euler")
    model = lively_model(preset)
    plain, longer = Rollout(preset, model, 2, CPU), Rollout(preset, model, 2, CPU)
    with torch.no_grad():
        for k in range(5):
            chunk = Chunk(model.prompts(IDS[:2]), IDS[:2], torch.tensor([False, k == 1]))
            for rollout, repeats in ((plain, 0), (longer, 3)):
                made = rollout.denoise(
                    chunk, lambda s, k=k: noise(k, s, 2), 0, fast_forward=repeats
                )
                rollout.absorb(chunk, made)
    was, now = plain.cache.memory_state, longer.cache.memory_state
    assert was is not None
    assert now is not None
    assert torch.equal(was[0], now[0])
    assert not torch.allclose(was[1], now[1], atol=1e-3)


def test_a_state_goes_on_bit_for_bit_where_it_was_saved() -> None:
    preset = sampled("euler", point_every=4)
    model = lively_model(preset)
    first, second = Rollout(preset, model, 1, CPU), Rollout(preset, model, 1, CPU)
    with torch.no_grad():
        for _ in range(6):
            rolled(first, model, IDS[:1])
        second.restore(first.state())
        for caption in (0, 1, 1, 1):
            ids = IDS[caption : caption + 1]
            assert torch.equal(rolled(first, model, ids), rolled(second, model, ids))


def test_caches_that_are_not_trained_are_refused() -> None:
    preset = small_preset(global_sink=False)
    with pytest.raises(ConfigError, match="global_sink"):
        Rollout(preset, lively_model(preset), 1, CPU)
    preset = small_preset(policy="absolute")
    with pytest.raises(ConfigError, match="rotated keys"):
        Rollout(preset, lively_model(preset), 1, CPU)
