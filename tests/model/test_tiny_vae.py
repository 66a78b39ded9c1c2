"""The small codec: published names, streams that equal whole videos, rebuilt states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as fn

from echo_ray.errors import WeightsError
from echo_ray.model.codec import CodecState
from echo_ray.model.state_dict import load_strict
from echo_ray.model.tiny_vae import MemoryBlock, TinyVae
from echo_ray.preset import TinyVaeShape

SMALL = TinyVaeShape(encoder_width=8, decoder_widths=(16, 8, 8, 4))
Weights = dict[str, Tensor]

PUBLISHED_ENCODER = {
    "0": (64, 3, 3, 3), "2.conv": (64, 128, 1, 1), "3": (64, 64, 3, 3),
    "7.conv": (64, 128, 1, 1), "8": (64, 64, 3, 3), "12.conv": (64, 64, 1, 1),
    "13": (64, 64, 3, 3), "17": (16, 64, 3, 3),
}  # fmt: skip
PUBLISHED_DECODER = {
    "1": (256, 16, 3, 3), "7.conv": (256, 256, 1, 1), "8": (128, 256, 3, 3),
    "13.conv": (256, 128, 1, 1), "14": (64, 128, 3, 3), "19.conv": (128, 64, 1, 1),
    "20": (64, 64, 3, 3), "22": (3, 64, 3, 3),
}  # fmt: skip
PUBLISHED_BLOCKS = {
    **{f"encoder.{i}": 64 for i in (4, 5, 6, 9, 10, 11, 14, 15, 16)},
    **{f"decoder.{i}": 256 for i in (3, 4, 5)},
    **{f"decoder.{i}": 128 for i in (9, 10, 11)},
    **{f"decoder.{i}": 64 for i in (15, 16, 17)},
}
WITH_BIAS = ("encoder.0", "encoder.17", "decoder.1", "decoder.22")


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Every key of the published checkpoint for Wan 2.1 latents, and its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for side, convs in (("encoder", PUBLISHED_ENCODER), ("decoder", PUBLISHED_DECODER)):
        for name, shape in convs.items():
            shapes[f"{side}.{name}.weight"] = shape
            if f"{side}.{name}" in WITH_BIAS:
                shapes[f"{side}.{name}.bias"] = shape[:1]
    for name, width in PUBLISHED_BLOCKS.items():
        for i in (0, 2, 4):
            shapes[f"{name}.conv.{i}.weight"] = (width, width if i else 2 * width, 3, 3)
            shapes[f"{name}.conv.{i}.bias"] = (width,)
    return shapes


def vae() -> TinyVae:
    torch.manual_seed(5)
    return TinyVae(SMALL, 4).eval().requires_grad_(False)


def latents(count: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, count, 4, 2, 3, generator=torch.Generator().manual_seed(seed))


def video(count: int) -> Tensor:
    return torch.rand(1, count, 3, 16, 24, generator=torch.Generator().manual_seed(count))


def weights_of(codec: TinyVae) -> Weights:
    return {k: v.clone() for k, v in codec.state_dict().items()}


def same(a: CodecState, b: CodecState) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def conv(w: Weights, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = w[f"{name}.weight"]
    return fn.conv2d(x, weight, w.get(f"{name}.bias"), stride, padding=weight.shape[-1] // 2)


def block(w: Weights, name: str, x: Tensor) -> Tensor:
    """A memory block over a whole video of one batch element; frames are dimension 0."""
    y = torch.cat([x, torch.cat([torch.zeros_like(x[:1]), x[:-1]])], dim=1)
    for i in (0, 2):
        y = conv(w, f"{name}.conv.{i}", y).clamp(min=0)
    return (conv(w, f"{name}.conv.4", y) + x).clamp(min=0)


def decode_whole(w: Weights, x: Tensor) -> Tensor:
    """A whole video's latents [F, C, h, w] to its frames, without state."""
    x = conv(w, "decoder.1", 3 * torch.tanh(x / 3)).clamp(min=0)
    for start, stride in ((3, 1), (9, 2), (15, 2)):
        for i in range(start, start + 3):
            x = block(w, f"decoder.{i}", x)
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        frames = conv(w, f"decoder.{start + 4}.conv", x).chunk(stride, dim=1)
        x = torch.stack(frames, dim=1).flatten(0, 1)
        x = conv(w, f"decoder.{start + 5}", x)
    return conv(w, "decoder.22", x.clamp(min=0)).clamp(0, 1)[3:]


def encode_whole(w: Weights, frames: Tensor) -> Tensor:
    """A whole video [N, 3, H, W], repeated at its end, to its latents, without state."""
    x = torch.cat([frames, frames[-1:].expand(-len(frames) % 4, -1, -1, -1)])
    x = conv(w, "encoder.0", x).clamp(min=0)
    for start, stride in ((2, 2), (7, 2), (12, 1)):
        x = conv(w, f"encoder.{start}.conv", torch.cat([x[i::stride] for i in range(stride)], 1))
        x = conv(w, f"encoder.{start + 1}", x, stride=2)
        for i in range(start + 2, start + 5):
            x = block(w, f"encoder.{i}", x)
    return conv(w, "encoder.17", x)


def test_the_published_shape_has_the_published_keys_and_sizes() -> None:
    with torch.device("meta"):
        codec = TinyVae(TinyVaeShape(), 16)
    assert {k: tuple(v.shape) for k, v in codec.state_dict().items()} == published_shapes()


def test_a_module_made_without_memory_loads_and_works_like_the_original() -> None:
    original = vae()
    with torch.device("meta"):
        empty = TinyVae(SMALL, 4)
    load_strict(empty, weights_of(original), "small_codec")
    assert all(not p.is_meta for p in empty.parameters())
    a, b = (c.decode(latents(3), c.initial_state())[0] for c in (original, empty))
    assert torch.equal(a, b)
    assert torch.equal(original.encode(video(5)), empty.encode(video(5)))


def test_weights_of_another_layout_are_refused() -> None:
    weights = weights_of(vae())
    weights["decoder.7.conv.weight"] = torch.zeros(32, 16, 1, 1)
    with pytest.raises(WeightsError, match=r"1 misshapen: decoder.7.conv.weight \(32, 16, 1, 1\)"):
        load_strict(vae(), weights, "small_codec")


def test_streaming_equals_the_whole_video_at_once() -> None:
    codec, z = vae(), latents(5, batch=2)
    frames, _ = codec.decode(z, codec.initial_state())
    assert frames.shape == (2, 17, 3, 16, 24)
    assert frames.dtype == torch.float32
    for i in range(2):
        whole = decode_whole(weights_of(codec), z[i])
        assert torch.allclose(frames[i], whole, rtol=0, atol=1e-5)
        assert float(whole.std()) > 0.005


def test_frames_are_clamped() -> None:
    codec = vae()
    codec.decoder[22].weight *= 1000
    frames, _ = codec.decode(latents(3), codec.initial_state())
    assert float(frames.min()) == 0.0
    assert float(frames.max()) == 1.0


def test_the_state_holds_one_frame_of_each_memory_block_and_no_more() -> None:
    codec = vae()
    _, state = codec.decode(latents(2), codec.initial_state())
    blocks = {f"decoder.{i}" for i in (3, 4, 5, 9, 10, 11, 15, 16, 17)}
    assert state.keys() == blocks | {"begun"}
    for key in blocks:
        assert state[key].shape[:2] == (1, 1)
        assert state[key].untyped_storage().nbytes() == state[key].nbytes
    assert state["decoder.17"].shape == (1, 1, 8, 8, 12)


def test_bfloat16_decodes_and_encodes_close_to_float32() -> None:
    exact, rough = vae(), vae().bfloat16()
    a, _ = exact.decode(latents(3), exact.initial_state())
    b, state = rough.decode(latents(3).bfloat16(), rough.initial_state())
    assert b.dtype == torch.float32
    assert state["decoder.3"].dtype == torch.bfloat16
    assert float((a - b).abs().mean()) < 0.01
    encoded = rough.encode(video(5))
    assert encoded.dtype == torch.bfloat16
    assert float((exact.encode(video(5)) - encoded).abs().mean()) < 0.01


def test_weights_laid_out_channels_last_give_the_same_frames() -> None:
    codec = vae()
    frames, _ = codec.decode(latents(3), codec.initial_state())
    encoded = codec.encode(video(5))
    codec.lie_channels_last()
    assert torch.allclose(codec.decode(latents(3), codec.initial_state())[0], frames, atol=1e-5)
    assert torch.allclose(codec.encode(video(5)), encoded, atol=1e-5)


def test_eight_latents_rebuild_the_state_bit_for_bit_and_seven_do_not() -> None:
    codec = vae()
    for module in codec.decoder:
        if isinstance(module, MemoryBlock):
            # The frame before counts most, so that its loss is not rounded away.
            module.conv[0].weight[:, module.conv[0].out_channels :] *= 4
    assert codec.rebuild_latents == 8
    past, coming = latents(11), latents(2, seed=1)
    _, state = codec.decode(past, codec.initial_state())
    rebuilt = codec.rebuild(past[:, -8:], first=False)
    assert same(rebuilt, state)
    assert torch.equal(codec.decode(coming, rebuilt)[0], codec.decode(coming, state)[0])
    assert not same(codec.rebuild(past[:, -7:], first=False), state)


def test_a_broken_latent_is_gone_from_the_state_after_exactly_so_many() -> None:
    codec = vae()
    _, state = codec.decode(torch.full_like(latents(1), torch.nan), codec.midstream_state())
    _, state = codec.decode(latents(codec.rebuild_latents - 1), state)
    assert any(v.isnan().any() for v in state.values())
    _, state = codec.decode(latents(1), state)
    assert not any(v.isnan().any() for v in state.values())


@pytest.mark.parametrize("groups", [0, 1, 3])
def test_encoding_in_groups_equals_the_whole_video_at_once(groups: int) -> None:
    codec, frames = vae(), video(1 + 4 * groups)
    encoded = codec.encode(frames)
    assert encoded.shape == (1, 1 + groups, 4, 2, 3)
    whole = encode_whole(weights_of(codec), frames[0])
    assert torch.allclose(encoded[0], whole, rtol=0, atol=1e-5)
