"""Tiers of precision: what each rounds, that it resumes bit for bit, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import small_engine, small_preset, small_tier
from torch import Tensor

from echo_kernels import linear8
from echo_kernels.rows8 import rows8
from echo_ray.config import ModelSection
from echo_ray.config_model import PRECISIONS
from echo_ray.engine.build import build_engine, computing_of
from echo_ray.engine.engine import EchoEngine
from echo_ray.errors import BackendMissing, ConfigError, DeviceTooOld
from echo_ray.evaluation.subject import ServedSubject
from echo_ray.evaluation.variants import Variant
from echo_ray.model import linear8 as layers
from echo_ray.model.attention import attention
from echo_ray.model.attention8 import Rounded, Scales, plain8, scales_of
from echo_ray.model.backends import PLAIN, Machine
from echo_ray.model.computing import Precision
from echo_ray.model.linear8 import Linear8
from echo_ray.preset import load_preset
from echo_ray.session.fingerprint import Fit, ResumePolicy, allows, fit, unfit
from echo_ray.session.snapshot import decode, encode

EXACT, FP8, BOTH = Precision.EXACT, Precision.FP8, Precision.FP8_ATTENTION8
TIERS = [FP8, BOTH]
CHUNKS = 8
H100 = Machine("cuda", "an H100", (9, 0))
A100 = Machine("cuda", "an A100", (8, 0))
PUBLISHED = load_preset("echo-infinity-1.3b")


def streamed(engine: EchoEngine) -> tuple[list[str], dict[int, bytes]]:
    """Digests of a stream with a switch in it, and the snapshots of its points."""
    state = engine.open("a red ball", 5)
    digests, points = [], {}
    for index in range(CHUNKS):
        digests.append(engine.step(state, ("a blue square",) if index == 5 else ()).digest)
        if state.at_point:
            points[state.next_index] = encode(engine.save(state))
    return digests, points


@pytest.mark.parametrize("tier", TIERS)
def test_resume_is_bit_identical_in_every_tier(tier: Precision) -> None:
    digests, points = streamed(small_tier(tier, point_every=3))
    assert len(set(digests)) == CHUNKS
    assert digests != streamed(small_engine(point_every=3))[0]
    assert sorted(points) == [3, 6]
    for point, blob in points.items():
        engine = small_tier(tier, point_every=3)
        state = engine.load(decode(blob))
        again = [
            engine.step(state, ("a blue square",) if i == 5 else ()).digest
            for i in range(point, CHUNKS)
        ]
        assert again == digests[point:], f"resume from point {point} differs"


def test_exact_is_the_default_and_rounds_nothing() -> None:
    assert ModelSection().precision == "exact"
    engine = small_tier(EXACT, point_every=3)
    assert streamed(engine) == streamed(small_engine(point_every=3))
    assert engine.fingerprint == small_engine(point_every=3).fingerprint


def test_a_tier_is_named_in_the_fingerprint() -> None:
    made = [small_engine().fingerprint, *(small_tier(tier).fingerprint for tier in TIERS)]
    assert [f.rsplit("/", 1)[1].rpartition("-")[0] for f in made] == ["", "fp8", "fp8+attention8"]
    assert len({f.rsplit("/", 1)[0] for f in made}) == 1
    assert len({f.rsplit("-", 1)[-1] for f in made}) == 3


def test_a_snapshot_of_another_tier_goes_on_only_where_that_is_allowed() -> None:
    exact, eight = small_engine(), small_tier(FP8)
    found = fit(exact.fingerprint, eight.fingerprint)
    assert found is Fit.OTHER_NUMERICS
    assert not allows(ResumePolicy.EXACT, found)
    assert allows(ResumePolicy.COMPATIBLE, found)
    told = unfit(exact.fingerprint, eight.fingerprint).message
    assert "another precision" in told
    assert "/fp8-" in told
    state = eight.load(exact.save(exact.open("a red ball", 1)))
    assert eight.step(state).index == 0


def test_configured_names_are_the_tiers_and_no_others() -> None:
    assert tuple(Precision) == PRECISIONS
    with pytest.raises(ConfigError, match=r"model\.precision: 'int4' .*: exact, fp8 or fp8\+att"):
        ModelSection(precision="int4")


def test_a_served_tier_is_the_one_that_is_evaluated() -> None:
    subject = ServedSubject(ModelSection(precision="fp8"))
    prints = [subject.engine().fingerprint, subject.engine(Variant.WINDOW).fingerprint]
    assert [f.rsplit("/", 1)[1].partition("-")[0] for f in prints] == ["fp8", "fp8"]
    assert len(set(prints)) == 2


# What is rounded


def test_linear_layers_of_blocks_are_rounded_but_for_a_prompts() -> None:
    dit = small_tier(FP8)._modules.dit
    found = {name for name, module in dit.named_modules() if isinstance(module, Linear8)}
    wanted = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q")
    wanted = (*wanted, "cross_attn.o", "ffn.0", "ffn.2")
    assert found == {f"blocks.{n}.{name}" for n in range(2) for name in wanted}
    layer = dit.all_blocks()[0].self_attn.q
    assert isinstance(layer, Linear8)
    assert layer.get_buffer("values").dtype is torch.float8_e4m3fn
    assert layer.get_buffer("scales").shape == (16, 1)
    assert not list(layer.parameters())


def test_rows_come_rounded_from_the_op_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's results are the only ones that a layer rounds itself: two a block."""
    engine = small_tier(FP8, point_every=0)
    rounded: list[Tensor] = []

    def noted(x: Tensor) -> Any:
        rounded.append(x)
        return rows8(x)

    monkeypatch.setattr(layers, "rows8", noted)
    products = []
    monkeypatch.setattr(layers, "linear8", lambda *a: products.append(a) or linear8(*a))
    engine.step(engine.open("a red ball", 5))
    # Two denoising forwards of two blocks, and a context pass that ends in the second's write.
    assert len(rounded) == 2 * 2 * 2 + 2
    assert len(products) == 2 * 2 * 8 + 8 + 2


@pytest.mark.parametrize("tier", TIERS)
def test_a_first_chunk_stays_near_the_exact_one(tier: Precision) -> None:
    chunks = []
    for precision in (EXACT, tier):
        engine = build_engine(ModelSection(precision=str(precision)))
        state = engine.open("a red circle on a black background", 3)
        engine.step(state)
        chunks.append(state.latent.history_BFCHW)
    distance = float((chunks[1] - chunks[0]).norm() / chunks[0].norm())
    assert 0.005 < distance < 0.3


def test_8_bit_attention_is_near_attention() -> None:
    source = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, n, 3, 16, generator=source) for n in (5, 40, 40))
    scales = Scales(*(torch.tensor([0.125, 0.25, 0.5]) for _ in range(3)))
    found = Rounded(plain8, scales)(q, k, v)
    expected = attention(q, k, v)
    assert found.shape == expected.shape
    assert 0.005 < float((found - expected).norm() / expected.norm()) < 0.1


def test_shares_of_the_softmax_are_summed_before_they_are_rounded() -> None:
    """Two keys that share evenly but for a hair: sums of rounded shares would hide the hair."""
    one = torch.ones(1)
    q = torch.ones(1, 1, 1, 16).to(torch.float8_e4m3fn)
    k = torch.zeros(1, 2, 1, 16)
    k[:, 1, :, 0] = 0.125
    v = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 1, 16)
    out = plain8(q, k.to(q.dtype), v.to(q.dtype), Scales(one, one, one), torch.float32)
    shares = torch.softmax(torch.tensor([0.0, 0.125 / 4]), 0)
    rounded = (256 * shares / shares.max()).to(torch.float8_e4m3fn).float()[1] / 256
    assert torch.allclose(out, (rounded * shares.max()).expand(1, 1, 16), rtol=1e-6)


def test_fixed_scales_cut_nothing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a stream of the model in the package: no head's numbers come near their limit's double,
    none is lost below, and every scale is a power of two."""
    engine = build_engine(ModelSection(precision="fp8+attention8"))
    blocks = engine._modules.dit.all_blocks()
    largest: list[float] = []

    def watch(attend: Rounded) -> Callable[..., Tensor]:
        def watched(*parts: Tensor) -> Tensor:
            for part, scales in zip(parts, attend.scales, strict=True):
                largest.append(float((part.abs().amax(dim=(0, 1, 3)) / scales).max()) / 448)
            return attend(*parts)

        return watched

    for block in blocks:
        assert isinstance(block.self_attn.attend, Rounded)
        for scales in block.self_attn.attend.scales:
            assert torch.equal(torch.exp2(torch.log2(scales).round()), scales)
        block.self_attn.attend = watch(block.self_attn.attend)
    state = engine.open("a red circle moving right on a black background", 1)
    for _ in range(6):
        engine.step(state)
    assert max(largest) <= 1.0
    assert min(largest) > 0.01


def test_scales_without_norms_follow_from_the_projections() -> None:
    from dataclasses import replace

    from echo_ray.weights.modules import build_modules

    preset = small_preset()
    bare = replace(preset, dit=replace(preset.dit, qk_norm=False))
    layer = build_modules(bare).dit.all_blocks()[0].self_attn
    scales = scales_of(layer)
    assert all(s.shape == (2,) and s.dtype is torch.float32 for s in scales)
    lengths = layer.q.weight.norm(dim=1).view(2, -1).amax(dim=1)
    ratio = scales.q_H / (lengths * 4 / 448)
    assert bool(((ratio >= 1) & (ratio < 2)).all())


# What is refused


@pytest.mark.parametrize("tier", TIERS)
def test_a_device_without_8_bits_is_refused(tier: Precision) -> None:
    config = ModelSection(precision=str(tier))
    told = r"model\.precision: fp8.* needs compute capability 9\.0, an A100 has 8\.0; take exact"
    with pytest.raises(DeviceTooOld, match=told):
        computing_of(config, PUBLISHED, A100)
    assert computing_of(ModelSection(), PUBLISHED, A100).precision is EXACT
    assert computing_of(config, PUBLISHED, Machine("cpu")).attention is PLAIN


def test_a_model_that_8_bits_cannot_hold_is_refused() -> None:
    tiny = load_preset("echo-tiny")
    with pytest.raises(ConfigError, match=r"fp8 on CUDA takes bfloat16 .* has float32, dit\.dim 1"):
        computing_of(ModelSection(precision="fp8"), tiny, H100)


def test_8_bit_attention_without_a_library_for_it_is_refused() -> None:
    with pytest.raises(BackendMissing, match="fa3 is not installed"):
        computing_of(ModelSection(precision="fp8+attention8"), PUBLISHED, H100)
    config = ModelSection(precision="fp8+attention8", attention="flash")
    with pytest.raises(ConfigError, match=r"flash has no 8 bits.*take fa3, or plain"):
        computing_of(config, PUBLISHED, H100)
    slow = ModelSection(precision="fp8+attention8", attention="plain")
    assert computing_of(slow, PUBLISHED, H100).attention.attend8 is plain8
    assert computing_of(ModelSection(precision="fp8"), PUBLISHED, H100).precision is FP8
