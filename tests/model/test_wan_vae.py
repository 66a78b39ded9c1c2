"""The Wan VAE: published names, streams that equal whole videos, states that rebuild exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from wan_whole import decode_whole, encode_whole

from echo_ray.errors import WeightsError
from echo_ray.model.codec import CodecState
from echo_ray.model.state_dict import load_strict
from echo_ray.model.wan_blocks import CausalConv
from echo_ray.model.wan_vae import WanVae
from echo_ray.preset import WanVaeShape, load_preset

MEAN, STD = (-0.7, 0.1, 1.5, -0.3), (2.8, 1.4, 0.6, 1.9)
SMALL = WanVaeShape(mean=MEAN, std=STD, dim=4, dim_mult=(1, 2, 2, 2))
"""The published structure, narrow."""
OTHER = WanVaeShape(
    mean=MEAN,
    std=STD,
    dim=4,
    dim_mult=(1, 2, 4),
    num_res_blocks=1,
    temporal_downsample=(True, False),
)
"""Fewer levels, time halved once, at another place."""


def vae(shape: WanVaeShape = SMALL) -> WanVae:
    torch.manual_seed(5)
    made = WanVae(shape, 4)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith("gamma"):
                weight += 0.3 * torch.randn_like(weight)
    return made.eval().requires_grad_(False)


def latents(count: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, count, 4, 2, 3, generator=torch.Generator().manual_seed(seed))


def video(count: int, shape: WanVaeShape = SMALL) -> torch.Tensor:
    side = shape.spatial_stride
    size = (1, count, 3, 2 * side, 3 * side)
    return torch.rand(size, generator=torch.Generator().manual_seed(count))


def weights_of(codec: WanVae) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in codec.state_dict().items()}


def decode_raw(
    codec: WanVae, z: torch.Tensor, state: CodecState
) -> tuple[torch.Tensor, CodecState]:
    parts = []
    for latent in z.unbind(1):
        pixels, state = codec.decode_raw(latent, state)
        parts.append(pixels)
    return torch.cat(parts, dim=1), state


def same(a: CodecState, b: CodecState) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def published_keys() -> set[str]:
    """Every key of the published checkpoint, from its layout."""
    both, gain = ("weight", "bias"), ("gamma",)

    def residual(at: str, shortcut: bool = False) -> set[str]:
        parts = {"residual.0": gain, "residual.2": both, "residual.3": gain, "residual.6": both}
        if shortcut:
            parts["shortcut"] = both
        return {f"{at}.{part}.{end}" for part, ends in parts.items() for end in ends}

    keys = {f"{name}.{end}" for name in ("conv1", "conv2") for end in both}
    for side in ("encoder", "decoder"):
        keys |= {f"{side}.conv1.{e}" for e in both} | {f"{side}.head.2.{e}" for e in both}
        keys |= {f"{side}.head.0.gamma", f"{side}.middle.1.norm.gamma"}
        keys |= {f"{side}.middle.1.{part}.{e}" for part in ("to_qkv", "proj") for e in both}
        keys |= residual(f"{side}.middle.0") | residual(f"{side}.middle.2")
    for at in (0, 1, 3, 4, 6, 7, 9, 10):
        keys |= residual(f"encoder.downsamples.{at}", shortcut=at in (3, 6))
    for at in (0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14):
        keys |= residual(f"decoder.upsamples.{at}", shortcut=at == 4)
    for at in ("encoder.downsamples.2", "encoder.downsamples.5", "encoder.downsamples.8",
               "decoder.upsamples.3", "decoder.upsamples.7", "decoder.upsamples.11"):  # fmt: skip
        keys |= {f"{at}.resample.1.{e}" for e in both}
    for at in ("encoder.downsamples.5", "encoder.downsamples.8",
               "decoder.upsamples.3", "decoder.upsamples.7"):  # fmt: skip
        keys |= {f"{at}.time_conv.{e}" for e in both}
    return keys


@pytest.fixture(scope="module")
def published() -> WanVae:
    shape = load_preset("echo-infinity-1.3b").codec
    assert isinstance(shape, WanVaeShape)
    with torch.device("meta"):
        return WanVae(shape, 16)


def test_the_published_shape_has_the_published_keys_and_parameters(published: WanVae) -> None:
    assert set(published.state_dict()) == published_keys()
    assert sum(p.numel() for p in published.parameters()) == 126_892_531


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("encoder.conv1.weight", (96, 3, 3, 3, 3)),
        ("encoder.downsamples.5.time_conv.weight", (192, 192, 3, 1, 1)),
        ("encoder.head.2.weight", (32, 384, 3, 3, 3)),
        ("conv1.weight", (32, 32, 1, 1, 1)),
        ("decoder.middle.1.norm.gamma", (384, 1, 1)),
        ("decoder.upsamples.3.time_conv.weight", (768, 384, 3, 1, 1)),
        ("decoder.upsamples.3.resample.1.weight", (192, 384, 3, 3)),
        ("decoder.upsamples.4.shortcut.weight", (384, 192, 1, 1, 1)),
        ("decoder.upsamples.14.residual.3.gamma", (96, 1, 1, 1)),
    ],
)
def test_published_sizes(published: WanVae, key: str, shape: tuple[int, ...]) -> None:
    assert tuple(published.state_dict()[key].shape) == shape


def test_a_module_made_without_memory_loads_and_works_like_the_original() -> None:
    original = vae()
    with torch.device("meta"):
        empty = WanVae(SMALL, 4)
    load_strict(empty, weights_of(original), "codec")
    assert all(not p.is_meta for p in empty.parameters())
    a, b = (c.decode(latents(3), c.initial_state())[0] for c in (original, empty))
    assert torch.equal(a, b)
    assert torch.equal(original.encode(video(5)), empty.encode(video(5)))


def test_other_names_are_refused() -> None:
    weights = weights_of(vae())
    weights["decoder.conv_in.weight"] = weights.pop("decoder.conv1.weight")
    with pytest.raises(WeightsError, match=r"missing: decoder.conv1.weight; 1 surplus"):
        load_strict(vae(), weights, "codec")


@pytest.mark.parametrize("shape", [SMALL, OTHER], ids=["published", "other"])
def test_streaming_equals_the_whole_video_at_once(shape: WanVaeShape) -> None:
    codec, mean, std = vae(shape), torch.tensor(MEAN), torch.tensor(STD)
    z = latents(5, batch=2)
    raw = (z * std[:, None, None] + mean[:, None, None]).transpose(1, 2)
    pixels, _ = decode_raw(codec, z, codec.initial_state())
    whole = decode_whole(weights_of(codec), raw).transpose(1, 2)
    assert pixels.shape == (2, 1 + 4 * shape.temporal_stride, *whole.shape[2:])
    assert torch.allclose(pixels, whole, rtol=0, atol=1e-5)
    assert float(whole.std()) > 0.05


def test_frames_are_float32_between_0_and_1() -> None:
    codec = vae()
    loud = 40 * latents(2)
    pixels, _ = decode_raw(codec, loud, codec.initial_state())
    codec.decoder.head["2"].weight *= 30
    frames, _ = codec.decode(loud, codec.initial_state())
    raw, _ = decode_raw(codec, loud, codec.initial_state())
    assert frames.dtype == raw.dtype == pixels.dtype == torch.float32
    assert float(raw.abs().max()) > 1
    assert torch.equal(frames, (raw.clamp(-1, 1) + 1) / 2)


def test_the_state_holds_two_frames_of_each_causal_convolution_and_no_more() -> None:
    codec = vae()
    _, first = codec.decode(latents(1), codec.initial_state())
    _, state = codec.decode(latents(2), codec.initial_state())
    times = {"decoder.upsamples.3.time_conv", "decoder.upsamples.7.time_conv"}
    assert state.keys() - first.keys() == times
    convs = {n for n, m in codec.named_modules() if isinstance(m, CausalConv) and "decoder" in n}
    assert state.keys() == convs | {"begun"}
    assert len(convs) == 32
    for key in convs:
        assert state[key].shape[2] == 2
        assert state[key].untyped_storage().nbytes() == state[key].nbytes
    assert state["decoder.head.2"].shape == (1, 4, 2, 16, 24)


def test_bfloat16_decodes_and_encodes_close_to_float32() -> None:
    exact, rough = vae(), vae().bfloat16()
    a, _ = exact.decode(latents(3), exact.initial_state())
    b, state = rough.decode(latents(3).bfloat16(), rough.initial_state())
    assert b.dtype == torch.float32
    assert state["decoder.conv1"].dtype == torch.bfloat16
    assert float((a - b).abs().mean()) < 0.02
    encoded = rough.encode(video(5).bfloat16())
    assert encoded.dtype == torch.bfloat16
    assert float((exact.encode(video(5)) - encoded).abs().mean()) < 0.02


def laid_out(x: torch.Tensor) -> bool:
    last = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
    return x.is_contiguous(memory_format=last)


def test_channels_last_gives_the_same_frames_and_stays_from_conv_to_conv() -> None:
    """A GPU's convolutions write the layout of their weights; between them nothing turns it."""
    codec, turned = vae(), []
    frames, state = codec.decode(latents(5), codec.initial_state())
    encoded = codec.encode(video(5))
    codec.lie_channels_last()
    convs = [m for m in codec.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    assert all(laid_out(conv.weight) for conv in convs)

    def as_on_a_gpu(conv: nn.Module, given: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        if conv is not codec.conv2 and not laid_out(given[0]):
            turned.append(conv)
        last = torch.channels_last_3d if out.dim() == 5 else torch.channels_last
        return out.contiguous(memory_format=last)

    for conv in convs:
        conv.register_forward_hook(as_on_a_gpu)
    first, begun = codec.decode(latents(5)[:, :1], codec.initial_state())
    turned.clear()
    others, last = codec.decode(latents(5)[:, 1:], begun)
    assert turned == []
    assert all(laid_out(past) for key, past in last.items() if key != "begun")
    assert torch.allclose(torch.cat([first, others], dim=1), frames, atol=1e-5)
    assert all(torch.allclose(last[key], state[key], atol=1e-4) for key in state)
    assert torch.allclose(codec.encode(video(5)), encoded, atol=1e-5)


def with_long_memory(shape: WanVaeShape) -> WanVae:
    """Weights under which the oldest frame counts most, so that its loss is not rounded away."""
    codec = vae(shape)
    for module in codec.modules():
        if isinstance(module, CausalConv):
            module.weight[:, :, 0] *= 4
            module.weight[:, :, 1:] *= 0.25
    return codec


@pytest.mark.parametrize(
    ("shape", "enough"), [(SMALL, 38), (OTHER, 33)], ids=["published", "other"]
)
def test_so_many_latents_rebuild_the_state_bit_for_bit_and_one_less_does_not(
    shape: WanVaeShape, enough: int
) -> None:
    codec = with_long_memory(shape)
    assert codec.rebuild_latents == enough
    past, coming = latents(enough + 3), latents(2, seed=1)
    _, state = codec.decode(past, codec.initial_state())
    rebuilt = codec.rebuild(past[:, -enough:], first=False)
    assert same(rebuilt, state)
    assert torch.equal(codec.decode(coming, rebuilt)[0], codec.decode(coming, state)[0])
    assert not same(codec.rebuild(past[:, 1 - enough :], first=False), state)


@pytest.mark.parametrize("shape", [SMALL, OTHER], ids=["published", "other"])
def test_a_broken_latent_is_gone_from_the_state_after_exactly_so_many(shape: WanVaeShape) -> None:
    codec = vae(shape)
    broken = torch.full_like(latents(1), torch.nan)
    _, state = codec.decode(latents(2), codec.initial_state())
    _, state = codec.decode(broken, state)
    _, state = codec.decode(latents(codec.rebuild_latents - 1), state)
    assert any(v.isnan().any() for v in state.values())
    _, state = codec.decode(latents(1), state)
    assert not any(v.isnan().any() for v in state.values())


def test_a_young_stream_is_rebuilt_from_all_its_latents() -> None:
    codec = vae()
    _, state = codec.decode(latents(4), codec.initial_state())
    assert same(codec.rebuild(latents(4), first=True), state)
    assert not same(codec.rebuild(latents(4), first=False), state)


@pytest.mark.parametrize("shape", [SMALL, OTHER], ids=["published", "other"])
@pytest.mark.parametrize("groups", [0, 1, 3])
def test_encoding_in_groups_equals_the_whole_video_at_once(shape: WanVaeShape, groups: int) -> None:
    codec, mean, std = vae(shape), torch.tensor(MEAN), torch.tensor(STD)
    frames = video(1 + groups * shape.temporal_stride, shape)
    whole = encode_whole(weights_of(codec), (2 * frames - 1).transpose(1, 2))[:, :4].transpose(1, 2)
    whole = (whole - mean[:, None, None]) / std[:, None, None]
    encoded = codec.encode(frames)
    assert encoded.shape == (1, 1 + groups, 4, 2, 3)
    assert torch.allclose(encoded, whole, rtol=0, atol=1e-5)
    assert torch.equal(codec.encode_raw(2 * frames - 1), encoded)


def test_encoding_looks_at_nothing_ahead() -> None:
    codec = vae()
    assert torch.equal(codec.encode(video(9))[:, :2], codec.encode(video(9)[:, :5]))
