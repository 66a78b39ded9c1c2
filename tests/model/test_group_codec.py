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
