"""Training sees what serving sees: the unrolled cache against the generator's own."""

from __future__ import annotations

import pytest
import torch
from small import small_preset

from echo_kernels.rotate import rotate
from echo_ray.engine.generator import Generator
from echo_ray.errors import ConfigError
from echo_ray.model.dit import PromptKV
from echo_ray.model.rope import FrameRope
from echo_ray.training.fast import dit_forward
from echo_ray.training.unroll import Unrolled
from echo_ray.weights.modules import build_modules


@pytest.fixture(autouse=True)
def no_gradients() -> object:
    with torch.no_grad():
        yield


def chunks_of_latents(count: int) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(2)
    return [torch.randn(1, 3, 4, 4, 4, generator=source) for _ in range(count)]


@pytest.mark.parametrize("policy", ["echo", "absolute"])
def test_keys_and_memory_equal_the_engines_over_a_whole_clip(policy: str) -> None:
    torch.manual_seed(11)
    preset = small_preset(point_every=0, policy=policy, recache=False)
    modules = build_modules(preset)
    dit, memory = modules.dit, modules.memory
    assert memory is not None
    text = torch.randn(1, 6, 16)
    generator = Generator(dit, memory, preset.cache, preset.sampler)
    state = generator.start(text)
    unrolled = Unrolled(preset, memory, 1)
    prompt = dit.encode_prompt(text)
    time = dit.condition(torch.zeros(1, 3))
    rope = FrameRope(preset.dit.grid_height, preset.dit.grid_width, preset.dit.head_dim, "cpu")
    for k, clean in enumerate(chunks_of_latents(9)):
        # The engine's first noisy call evicts and updates; then the given latents join the past.
        generator.denoise(state, lambda chunk, step: torch.zeros(1, 3, 4, 4, 4))
        generator.absorb(state, clean)
        unrolled.evict()
        past, own = unrolled.view()
        _, written = dit_forward(dit, clean, time, prompt, past, own, 1)
        unrolled.keep(written)
        held = torch.cat([c[-1][0] for c in unrolled.local], dim=1) if unrolled.local else None
        if held is not None:
            sink = preset.cache.sink_frames
            keys, _ = state.window.last_layer(sink, state.window.local_held)
            if policy == "absolute":
                held = rotate(held, rope.table(state.window.frames[sink:]))
            assert torch.allclose(held, keys, atol=1e-4), f"chunk {k}"
        assert (unrolled.memory_state is not None) == state.has_history
        if unrolled.memory_state is not None:
            assert state.query_BMC is not None
            assert torch.allclose(unrolled.memory_state, state.query_BMC, atol=1e-4)


@pytest.mark.parametrize("policy", ["echo", "absolute"])
def test_a_rebuild_is_the_engines_at_a_switch(policy: str) -> None:
    """Whether the memory is seen by it is the policy's to say."""
    torch.manual_seed(14)
    preset = small_preset(point_every=0, policy=policy, recache=False)
    modules = build_modules(preset)
    dit, memory = modules.dit, modules.memory
    texts = torch.randn(2, 1, 6, 16)
    generator = Generator(dit, memory, preset.cache, preset.sampler)
    state = generator.start(texts[0])
    unrolled = Unrolled(preset, memory, 1)
    time, prompt = dit.condition(torch.zeros(1, 3)), dit.encode_prompt(texts[0])
    latents = chunks_of_latents(7)
    for clean in latents:
        generator.adopt(state, clean)
        unrolled.evict()
        past, own = unrolled.view()
        unrolled.keep(dit_forward(dit, clean, time, prompt, past, own, 1)[1])
    generator.switch(state, texts[1])
    past, _ = unrolled.rebuild_view()
    assert past is not None
    seen = past.layers[0][0].shape[1] // preset.dit.tokens_per_frame
    assert seen == preset.cache.sink_frames + (3 if policy == "absolute" else 0)
    _rebuild(unrolled, dit, torch.cat(latents[-3:], dim=1), dit.encode_prompt(texts[1]))
    generator.denoise(state, lambda chunk, step: torch.zeros(1, 3, 4, 4, 4))
    unrolled.evict()
    assert unrolled.memory_state is not None
    assert state.query_BMC is not None
    assert torch.allclose(unrolled.memory_state, state.query_BMC, atol=1e-4)


def test_time_is_drawn_out_by_the_same_rotated_keys() -> None:
    torch.manual_seed(15)
    preset = small_preset(policy="absolute", recache=False)
    encoder = build_modules(preset).memory
    assert encoder is not None
    once, thrice = Unrolled(preset, encoder, 2), Unrolled(preset, encoder, 2)
    source = torch.Generator().manual_seed(4)
    clean = [torch.randn(2, 2, 12, 2, 8, generator=source) for _ in range(4)]
    for unrolled in (once, thrice):
        for key, value in clean:
            unrolled.keep([(key, value)] * 2)
    leaving = once.leave()
    assert leaving is not None
    assert not torch.allclose(leaving[0], clean[1][0])
    once.remember(leaving)
    twice_more = thrice.leave()
    assert twice_more is not None
    thrice.remember(twice_more, 2, torch.tensor([False, True]))
    states = once.memory_state, thrice.memory_state
    assert states[0] is not None
    assert states[1] is not None
    expected = encoder.update(encoder.update(states[0], *leaving), *leaving)
    assert torch.equal(states[1][0], states[0][0])
    assert torch.allclose(states[1][1], expected[1], atol=1e-6)


def test_rotated_keys_are_not_trained_with_a_memory_that_is_rebuilt_at_switches() -> None:
    preset = small_preset(policy="absolute", recache=True)
    memory = build_modules(preset).memory
    with pytest.raises(ConfigError, match=r"recache: true is not trained .* absolute.*to false"):
        Unrolled(preset, memory, 1)
    assert Unrolled(preset, None, 1).chunk == 0


def test_copies_are_independent_of_each_other() -> None:
    torch.manual_seed(12)
    preset = small_preset()
    dit = build_modules(preset).dit
    unrolled = Unrolled(preset, None, 2)
    prompt = dit.encode_prompt(torch.randn(2, 6, 16))
    first = torch.randn(2, 3, 4, 4, 4)
    past, own = unrolled.view()
    _, written = dit_forward(dit, first, dit.condition(torch.zeros(2, 3)), prompt, past, own, 1)
    unrolled.keep(written)
    past, own = unrolled.view()
    x, t = torch.randn(6, 3, 4, 4, 4), torch.rand(6, 1).expand(-1, 3) * 1000
    together, _ = dit_forward(dit, x, dit.condition(t), prompt, past, own, 3)
    for copy in range(3):
        rows = slice(2 * copy, 2 * copy + 2)
        alone, _ = dit_forward(dit, x[rows], dit.condition(t[rows]), prompt, past, own, 1)
        assert torch.allclose(together[rows], alone, atol=1e-5)


def test_a_sink_that_is_not_seen_has_no_part_in_anything() -> None:
    torch.manual_seed(16)
    preset = small_preset()
    modules = build_modules(preset)
    dit, memory = modules.dit, modules.memory
    prompt = dit.encode_prompt(torch.randn(1, 6, 16))
    time = dit.condition(torch.zeros(1, 3))

    def last_flow(sink: torch.Tensor, *, seen: bool, with_memory: bool) -> torch.Tensor:
        unrolled = Unrolled(preset, memory if with_memory else None, 1, sink_seen=seen)
        for number, clean in enumerate([sink, *chunks_of_latents(6)]):
            unrolled.evict()
            past, own = unrolled.view()
            assert (past is None) == (number == 0 or (number == 1 and not seen))
            flow, written = dit_forward(dit, clean, time, prompt, past, own, 1)
            unrolled.keep(written)
        return flow

    one, other = torch.zeros(1, 3, 4, 4, 4), torch.ones(1, 3, 4, 4, 4)
    for with_memory in (False, True):
        blind = [last_flow(s, seen=False, with_memory=with_memory) for s in (one, other)]
        assert torch.equal(*blind)
        seeing = [last_flow(s, seen=True, with_memory=with_memory) for s in (one, other)]
        assert not torch.equal(*seeing)


def test_a_rebuild_replaces_every_local_chunk() -> None:
    torch.manual_seed(13)
    preset = small_preset()
    dit = build_modules(preset).dit
    unrolled = Unrolled(preset, None, 1)
    time = dit.condition(torch.zeros(1, 3))
    old, new = (dit.encode_prompt(torch.randn(1, 6, 16)) for _ in range(2))
    latents = chunks_of_latents(4)
    for clean in latents:
        past, own = unrolled.view()
        _, written = dit_forward(dit, clean, time, old, past, own, 1)
        unrolled.keep(written)
    before = [chunk[-1][0] for chunk in unrolled.local]
    rebuilt = _rebuild(unrolled, dit, torch.cat(latents[1:], dim=1), new)
    assert len(unrolled.local) == 3
    for chunk, was, now in zip(unrolled.local, before, rebuilt.chunk(3, dim=1), strict=True):
        assert torch.equal(chunk[-1][0], now)
        assert not torch.allclose(was, now)


def _rebuild(
    unrolled: Unrolled, dit: torch.nn.Module, latents: torch.Tensor, prompt: PromptKV
) -> torch.Tensor:
    past, own = unrolled.rebuild_view()
    time = dit.condition(torch.zeros(1, latents.shape[1]))  # type: ignore[operator]
    _, written = dit_forward(dit, latents, time, prompt, past, own, 1)  # type: ignore[arg-type]
    unrolled.replace_local(written)
    return written[-1][0]
