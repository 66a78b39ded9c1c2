"""The group codec: frame counts, streaming that equals one pass, state."""

from __future__ import annotations

import pytest
import torch
from small import small_preset

from echo_ray.errors import InvalidRequestError
from echo_ray.model.codec import Codec
from echo_ray.model.group_codec import GroupCodec


@pytest.fixture
def codec() -> GroupCodec:
    torch.manual_seed(3)
    codec = GroupCodec(small_preset().codec, 4)
    codec.mean.copy_(torch.randn(4))
    codec.std.copy_(torch.rand(4) + 0.5)
    return codec.eval().requires_grad_(False)


def latents(count: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, count, 4, 4, 4, generator=torch.Generator().manual_seed(count))


def test_first_chunk_is_nine_frames_and_later_ones_twelve(codec: GroupCodec) -> None:
    state = codec.initial_state()
    counts = []
    for part in latents(9).chunk(3, dim=1):
        frames, state = codec.decode(part, state)
        counts.append(frames.shape[1])
        assert frames.shape[2:] == (3, 32, 32)
    assert counts == [9, 12, 12]


@pytest.mark.parametrize("sizes", [(3, 3, 3), (1, 5, 3), (1,) * 9])
def test_chunk_by_chunk_equals_one_pass_bit_for_bit(
    codec: GroupCodec, sizes: tuple[int, ...]
) -> None:
    whole, _ = codec.decode(latents(9, batch=2), codec.initial_state())
    state, parts = codec.initial_state(), []
    for part in latents(9, batch=2).split(list(sizes), dim=1):
        frames, state = codec.decode(part, state)
        parts.append(frames)
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_rebuilt_state_goes_on_like_the_original(codec: GroupCodec) -> None:
    video = latents(6)
    _, state = codec.decode(video[:, :3], codec.initial_state())
    rebuilt = codec.rebuild(video[:, 1:3], first=False)
    assert rebuilt.keys() == state.keys()
    assert all(torch.equal(rebuilt[k], state[k]) for k in state)
    went_on, _ = codec.decode(video[:, 3:], rebuilt)
    assert torch.equal(went_on, codec.decode(video[:, 3:], state)[0])
    assert torch.equal(went_on, codec.decode(video, codec.initial_state())[0][:, 9:])


def test_rebuild_of_nothing_is_the_start_only_where_the_stream_starts(codec: GroupCodec) -> None:
    nothing = latents(3)[:, :0]
    assert codec.decode(latents(1), codec.rebuild(nothing, first=True))[0].shape[1] == 1
    assert codec.decode(latents(1), codec.rebuild(nothing, first=False))[0].shape[1] == 4


def test_decoding_does_not_change_the_state_it_was_given(codec: GroupCodec) -> None:
    state = codec.initial_state()
    first, _ = codec.decode(latents(3), state)
    again, _ = codec.decode(latents(3), state)
    assert torch.equal(first, again)


def test_frames_are_clamped(codec: GroupCodec) -> None:
    frames, _ = codec.decode(1000 * latents(3), codec.initial_state())
    assert float(frames.min()) >= 0.0
    assert float(frames.max()) <= 1.0


def test_encode_repeats_the_first_frame_and_looks_at_nothing_ahead(codec: GroupCodec) -> None:
    video = torch.rand(1, 9, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    encoded = codec.encode(video)
    assert encoded.shape == (1, 3, 4, 4, 4)
    assert torch.allclose(encoded[:, :2], codec.encode(video[:, :5]), atol=1e-6)
    assert torch.allclose(encoded[:, :1], codec.encode(video[:, :1]), atol=1e-6)


def test_encode_normalises_per_channel(codec: GroupCodec) -> None:
    video = torch.rand(1, 5, 3, 32, 32)
    raw_mean, raw_std = codec.mean.clone(), codec.std.clone()
    normalised = codec.encode(video)
    codec.mean.zero_()
    codec.std.fill_(1.0)
    raw = codec.encode(video)
    shift, scale = raw_mean[:, None, None], raw_std[:, None, None]
    assert torch.allclose(normalised * scale + shift, raw, atol=1e-5)


def test_a_frame_count_that_makes_no_whole_latents_is_refused(codec: GroupCodec) -> None:
    refused = "7 frames cannot be encoded: needs 1 . a multiple of 4; give 5"
    with pytest.raises(InvalidRequestError, match=refused):
        codec.encode(torch.rand(1, 7, 3, 32, 32))
    with pytest.raises(InvalidRequestError, match="0 frames cannot be encoded"):
        codec.encode(torch.rand(1, 0, 3, 32, 32))


def test_it_is_a_codec_that_needs_no_latents_to_go_on(codec: GroupCodec) -> None:
    assert isinstance(codec, Codec)
    assert codec.rebuild_latents == 0
    assert torch.equal(codec.midstream_state()["begun"], torch.ones(1, dtype=torch.uint8))


def test_frames_are_float32_whatever_the_weights_are(codec: GroupCodec) -> None:
    frames, _ = codec.bfloat16().decode(latents(2).bfloat16(), codec.initial_state())
    assert frames.dtype == torch.float32


def test_a_picture_size_that_makes_no_whole_latents_is_refused(codec: GroupCodec) -> None:
    with pytest.raises(InvalidRequestError, match=r"36 x 32 cannot be encoded.*multiples of 8"):
        codec.encode(torch.rand(1, 5, 3, 32, 36))
