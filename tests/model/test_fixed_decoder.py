"""Decoding in place: the same bits, at the same addresses, by work that no value decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import CODECS, small_preset
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from echo_ray.errors import EngineError
from echo_ray.model.codec import Codec, CodecState
from echo_ray.weights.parts import build_codec

HOST_READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}


class Tape(TorchDispatchMode):
    """Notes every op with the tensors it read and wrote, and runs them again, as a graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out

    @property
    def shapes(self) -> list[tuple[str, Any]]:
        return [
            (str(f), [(tuple(a.shape), a.stride()) for a in args if isinstance(a, Tensor)])
            for f, args, _, _ in self.ops
        ]

    def play(self) -> None:
        for func, args, kwargs, out in self.ops:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                fresh = isinstance(old, Tensor) and new.data_ptr() != old.data_ptr()
                if fresh and "empty" not in str(func):
                    old.copy_(new)


@pytest.fixture(params=sorted(CODECS))
def codec(request: pytest.FixtureRequest) -> Codec:
    torch.manual_seed(5)
    made = build_codec(CODECS[request.param], small_preset().dit)
    return made.eval().requires_grad_(requires_grad=False)


def latents(count: int, seed: int = 0) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return list(torch.randn(1, count, 4, 2, 3, generator=source).unbind(1))


def expected(codec: Codec, stream: list[Tensor]) -> tuple[list[Tensor], CodecState]:
    state, frames = codec.initial_state(), []
    for latent in stream:
        new, state = codec.decode_next(latent, state)
        frames.append(new)
    return frames, state


def addresses(state: CodecState) -> dict[str, int]:
    return {key: past.data_ptr() for key, past in state.items() if key != "begun"}


def same(a: CodecState, b: CodecState) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_in_place_is_the_same_stream_at_the_same_addresses(codec: Codec) -> None:
    stream = latents(5)
    frames, after = expected(codec, stream)
    state = codec.fixed_state(stream[0])
    at = addresses(state)
    for index, (latent, true) in enumerate(zip(stream, frames, strict=True)):
        assert torch.equal(codec.decode_fixed(latent, state, first=index == 0), true)
        assert addresses(state) == at
    del after["begun"], state["begun"]
    assert same(state, after)


def test_a_fixed_state_is_the_state_of_a_stream_without_a_past(codec: Codec) -> None:
    fixed = codec.fixed_state(torch.full_like(latents(1)[0], torch.nan))
    assert not any(past.any() for past in fixed.values())
    assert codec.decode_next(latents(1)[0], fixed)[0].shape[1] == 1


def test_two_sessions_share_no_memory(codec: Codec) -> None:
    one, two = latents(4), latents(4, seed=1)
    alone = [expected(codec, stream)[0] for stream in (one, two)]
    states = [codec.fixed_state(one[0]) for _ in range(2)]
    for index in range(4):
        for session, stream in enumerate((one, two)):
            found = codec.decode_fixed(stream[index], states[session], first=index == 0)
            assert torch.equal(found, alone[session][index])
    assert not set(addresses(states[0]).values()) & set(addresses(states[1]).values())


def test_only_who_asks_for_it_loses_a_state(codec: Codec) -> None:
    """A call of many latents goes on in place, but never on what it was given or gave back."""
    _, before = codec.decode(torch.stack(latents(3), dim=1), codec.initial_state())
    copy = {key: past.clone() for key, past in before.items()}
    _, after = codec.decode(torch.stack(latents(3, seed=1), dim=1), before)
    kept = {key: past.clone() for key, past in after.items()}
    codec.decode(torch.stack(latents(3, seed=2), dim=1), after)
    assert same(before, copy)
    assert same(after, kept)
    assert not set(addresses(before).values()) & set(addresses(after).values())


@pytest.mark.parametrize("first", [True, False])
def test_a_recorded_call_decodes_other_latents(codec: Codec, first: bool) -> None:
    """Once recorded, ops run again on the same memory make a stream's frames: a graph's terms."""
    stream = latents(6)
    frames, _ = expected(codec, stream)
    state, given = codec.fixed_state(stream[0]), torch.empty_like(stream[0])
    if not first:
        codec.decode_fixed(stream[0], state, first=True)
    saved = {key: past.clone() for key, past in state.items()}
    given.copy_(stream[-1])
    with Tape() as tape:
        out = codec.decode_fixed(given, state, first=first)
    for key, past in saved.items():
        state[key].copy_(past)
    replayed = slice(0, 1) if first else slice(1, None)
    for latent, true in zip(stream[replayed], frames[replayed], strict=True):
        given.copy_(latent)
        tape.play()
        assert torch.equal(out, true)


def test_every_later_latent_is_the_same_work(codec: Codec) -> None:
    state, tapes = codec.fixed_state(latents(1)[0]), []
    for index, latent in enumerate(latents(4)):
        with Tape() as tape:
            codec.decode_fixed(latent, state, first=index == 0)
        tapes.append(tape)
    assert tapes[1].shapes == tapes[2].shapes == tapes[3].shapes
    assert not {f.overloadpacket.__name__ for f, *_ in tapes[2].ops} & HOST_READS


def test_a_state_without_room_is_refused() -> None:
    torch.manual_seed(5)
    codec = build_codec(CODECS["wan"], small_preset().dit)
    with pytest.raises(EngineError, match=r"no room for decoder\.\S+; make it with fixed_state"):
        codec.decode_fixed(latents(1)[0], codec.initial_state(), first=True)


def test_a_device_is_never_read(codec: Codec) -> None:
    """On `meta` there are no values, so whatever asks for one fails."""
    on_meta = codec.to("meta")
    latent = torch.empty(1, 4, 2, 3, device="meta")
    state = on_meta.fixed_state(latent)
    for index in range(3):
        frames = on_meta.decode_fixed(latent, state, first=index == 0)
    assert frames.shape == (1, 4, 3, 16, 24)
