"""What every codec promises, over all of them: counts, streams, states, refusals."""

from __future__ import annotations

import pytest
import torch
from small import CODECS, small_preset
from torch import Tensor

from echo_ray.errors import InvalidRequestError
from echo_ray.model.codec import Codec, CodecState
from echo_ray.weights.parts import build_codec


@pytest.fixture(params=sorted(CODECS))
def codec(request: pytest.FixtureRequest) -> Codec:
    torch.manual_seed(5)
    made = build_codec(CODECS[request.param], small_preset().dit)
    return made.eval().requires_grad_(requires_grad=False)


def latents(count: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, count, 4, 2, 3, generator=torch.Generator().manual_seed(seed))


def video(count: int) -> Tensor:
    return torch.rand(1, count, 3, 16, 24, generator=torch.Generator().manual_seed(count))


def same(a: CodecState, b: CodecState) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_first_chunk_is_nine_frames_and_later_ones_twelve(codec: Codec) -> None:
    state, counts = codec.initial_state(), []
    for part in latents(9).chunk(3, dim=1):
        frames, state = codec.decode(part, state)
        counts.append(frames.shape[1])
        assert frames.shape[2:] == (3, 16, 24)
        assert frames.dtype == torch.float32
        assert 0.0 <= float(frames.min()) <= float(frames.max()) <= 1.0
    assert counts == [9, 12, 12]


@pytest.mark.parametrize("sizes", [(3, 2), (1, 2, 2), (1,) * 5])
def test_cutting_a_stream_into_calls_changes_no_bit(codec: Codec, sizes: tuple[int, ...]) -> None:
    whole, end = codec.decode(latents(5, batch=2), codec.initial_state())
    state, parts = codec.initial_state(), []
    for part in torch.split(latents(5, batch=2), list(sizes), dim=1):
        frames, state = codec.decode(part, state)
        parts.append(frames)
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert same(state, end)


def test_decoding_does_not_change_the_state_it_was_given(codec: Codec) -> None:
    _, state = codec.decode(latents(3), codec.initial_state())
    before = {k: v.clone() for k, v in state.items()}
    frames, _ = codec.decode(latents(2, seed=1), state)
    assert same(state, before)
    assert torch.equal(codec.decode(latents(2, seed=1), state)[0], frames)


def test_no_latents_are_no_frames_and_leave_the_state(codec: Codec) -> None:
    for state in (codec.initial_state(), codec.decode(latents(2), codec.initial_state())[1]):
        frames, after = codec.decode(latents(1)[:, :0], state)
        assert frames.shape == (1, 0, 3, 16, 24)
        assert same(after, state)


def test_the_latents_it_asks_for_rebuild_the_state_bit_for_bit(codec: Codec) -> None:
    enough = codec.rebuild_latents
    past, coming = latents(enough + 3), latents(2, seed=1)
    _, state = codec.decode(past, codec.initial_state())
    rebuilt = codec.rebuild(past[:, past.shape[1] - enough :], first=False)
    assert same(rebuilt, state)
    assert torch.equal(codec.decode(coming, rebuilt)[0], codec.decode(coming, state)[0])


def test_a_young_stream_is_rebuilt_from_all_its_latents(codec: Codec) -> None:
    _, state = codec.decode(latents(4), codec.initial_state())
    assert same(codec.rebuild(latents(4), first=True), state)


def test_rebuild_of_nothing_is_the_start_only_where_the_stream_starts(codec: Codec) -> None:
    nothing = latents(1)[:, :0]
    assert codec.decode(latents(1), codec.rebuild(nothing, first=True))[0].shape[1] == 1
    assert codec.decode(latents(1), codec.rebuild(nothing, first=False))[0].shape[1] == 4


def test_latents_of_other_channels_are_refused(codec: Codec) -> None:
    with pytest.raises(InvalidRequestError, match=r"\(1, 2, 5, 2, 3\) cannot be decoded.*4, h"):
        codec.decode(torch.zeros(1, 2, 5, 2, 3), codec.initial_state())
    with pytest.raises(InvalidRequestError, match=r"\(2, 4, 2, 3\) cannot be decoded"):
        codec.decode(torch.zeros(2, 4, 2, 3), codec.initial_state())


@pytest.mark.parametrize(("count", "nearest"), [(0, 1), (2, 1), (4, 1), (7, 5)])
def test_a_frame_count_that_makes_no_whole_latents_is_refused(
    codec: Codec, count: int, nearest: int
) -> None:
    refused = f"{count} frames cannot be encoded: needs 1 . a multiple of 4; give {nearest}"
    with pytest.raises(InvalidRequestError, match=refused):
        codec.encode(video(count))


def test_a_picture_size_that_makes_no_whole_latents_is_refused(codec: Codec) -> None:
    with pytest.raises(InvalidRequestError, match=r"30 x 16 cannot be encoded.*multiples of 8"):
        codec.encode(torch.rand(1, 1, 3, 16, 30))
