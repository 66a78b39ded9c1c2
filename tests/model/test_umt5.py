"""The umT5 encoder against a naive one, its padding, its keys and the reference's own numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from echo_ray.errors import ConfigError, WeightsError
from echo_ray.model.umt5 import UMT5Encoder, relative_buckets
from echo_ray.preset import UMT5Shape

FIXTURES = Path(__file__).parents[3] / "shared" / "parity"

DIM = 6
SHAPE = UMT5Shape(
    vocab=11, dim_attn=8, dim_ffn=10, num_heads=2, num_layers=2, num_buckets=8, max_distance=12
)

Rows = list[list[float]]

# First distance of each bucket behind the query, read from the reference's own table.
FIRST_DISTANCES = {
    0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7, 8: 8, 9: 12, 10: 16, 11: 23, 12: 32, 13: 46,
    14: 64, 15: 91,
}  # fmt: skip


def encoder(shape: UMT5Shape = SHAPE, dim: int = DIM, seed: int = 5) -> UMT5Encoder:
    """A small encoder whose every weight matters."""
    module = UMT5Encoder(shape, dim)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            scale = 1.0 if weight.ndim == 1 or "embedding" in name else weight.shape[1] ** -0.5
            weight.copy_(torch.randn(weight.shape, generator=g) * scale)
    return module.eval().requires_grad_(requires_grad=False)


def prompt(*lengths: int, length: int = 9, vocab: int = 11) -> tuple[Tensor, Tensor]:
    ids = torch.randint(
        2, vocab, (len(lengths), length), generator=torch.Generator().manual_seed(1)
    )
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def naive_bucket(distance: int, buckets: int, limit: int) -> int:
    half, exact, d = buckets // 2, buckets // 4, abs(distance)
    if d >= exact:
        grown = math.log(d / exact) / math.log(limit / exact) * (half - exact)
        d = min(exact + math.floor(grown + 1e-9), half - 1)
    return d + (half if distance > 0 else 0)


def naive_norm(row: list[float], weight: list[float]) -> list[float]:
    scale = 1 / math.sqrt(sum(v * v for v in row) / len(row) + 1e-6)
    return [v * scale * w for v, w in zip(row, weight, strict=True)]


def naive_linear(row: list[float], weight: Rows) -> list[float]:
    return [sum(a * b for a, b in zip(row, line, strict=True)) for line in weight]


def naive_gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def naive_attention(w: dict[str, Any], at: str, x: Rows, shape: UMT5Shape) -> Rows:
    """One true token after the other, head by head, key by key."""
    q, k, v = ([naive_linear(row, w[f"{at}.attn.{n}.weight"]) for row in x] for n in "qkv")
    bias, size = w[f"{at}.pos_embedding.embedding.weight"], shape.dim_attn // shape.num_heads
    out = []
    for i in range(len(x)):
        mixed: list[float] = []
        for head in range(shape.num_heads):
            part = slice(head * size, head * size + size)
            grown = []
            for j in range(len(x)):
                bucket = naive_bucket(j - i, shape.num_buckets, shape.max_distance)
                logit = sum(a * b for a, b in zip(q[i][part], k[j][part], strict=True))
                grown.append(math.exp(logit + bias[bucket][head]))
            shares = [g / sum(grown) for g in grown]
            mixed += [sum(s * v[j][part][c] for j, s in enumerate(shares)) for c in range(size)]
        out.append(naive_linear(mixed, w[f"{at}.attn.o.weight"]))
    return out


def naive_encode(w: dict[str, Any], ids: list[int], shape: UMT5Shape) -> Rows:
    """Rows of the true tokens only, in plain numbers."""
    x = [list(w["token_embedding.weight"][i]) for i in ids]
    for n in range(shape.num_layers):
        at = f"blocks.{n}"
        scale1, scale2 = (w[f"{at}.norm{i}.weight"] for i in (1, 2))
        added = naive_attention(w, at, [naive_norm(row, scale1) for row in x], shape)
        x = [[a + b for a, b in zip(r, s, strict=True)] for r, s in zip(x, added, strict=True)]
        for row in x:
            h = naive_norm(row, scale2)
            gate = [naive_gelu(g) for g in naive_linear(h, w[f"{at}.ffn.gate.0.weight"])]
            wide = naive_linear(h, w[f"{at}.ffn.fc1.weight"])
            product = [a * b for a, b in zip(wide, gate, strict=True)]
            for c, value in enumerate(naive_linear(product, w[f"{at}.ffn.fc2.weight"])):
                row[c] += value
    return [naive_norm(row, w["norm.weight"]) for row in x]


@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_naive_encoder_agrees(count: int) -> None:
    module = encoder()
    ids, mask = prompt(count)
    weights = {k: v.double().tolist() for k, v in module.state_dict().items()}
    naive = torch.tensor(naive_encode(weights, ids[0, :count].tolist(), SHAPE))
    rows = module(ids, mask)[0]
    torch.testing.assert_close(rows[:count], naive, atol=1e-5, rtol=1e-5)
    assert torch.count_nonzero(rows[count:]) == 0


def test_buckets_begin_where_the_reference_s_do() -> None:
    buckets = relative_buckets(300, 32, 128).tolist()
    for bucket, distance in FIRST_DISTANCES.items():
        assert buckets[299 - distance] == bucket
        if distance:
            assert buckets[299 - distance + 1] == bucket - 1
            assert buckets[299 + distance] == bucket + 16
    assert buckets[0] == 15
    assert buckets[-1] == 31


@pytest.mark.parametrize(("buckets", "limit"), [(4, 2), (8, 12), (12, 20), (32, 128), (64, 100)])
def test_buckets_of_other_sizes(buckets: int, limit: int) -> None:
    expected = [naive_bucket(d, buckets, limit) for d in range(-149, 150)]
    assert relative_buckets(150, buckets, limit).tolist() == expected


def test_a_single_token_has_one_distance() -> None:
    assert relative_buckets(1, 32, 128).tolist() == [0]


def test_what_stands_in_the_padding_does_not_matter() -> None:
    module = encoder()
    ids, mask = prompt(4)
    other = torch.where(mask == 0, 7, ids)
    assert torch.equal(module(ids, mask), module(other, mask))


def test_a_batch_of_two_lengths_equals_two_runs() -> None:
    module = encoder()
    ids, mask = prompt(3, 8)
    together = module(ids, mask)
    for i in range(2):
        alone = module(ids[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 5, 9])
def test_one_prompt_on_its_own_tokens_is_the_same(count: int) -> None:
    module = encoder()
    ids, mask = prompt(count)
    rows = module.encode_ids(ids[0].tolist(), mask[0].tolist())
    assert rows.shape == (1, 9, DIM)
    torch.testing.assert_close(rows, module(ids, mask), atol=1e-6, rtol=1e-6)


def test_ids_without_a_row_and_prompts_without_a_token_are_refused() -> None:
    module = encoder()
    with pytest.raises(WeightsError, match="from 3 to 11: the text encoder has the ids 0 to 10"):
        module.encode_ids([3, 11], [1, 1])
    with pytest.raises(WeightsError, match="from -1 to 3"):
        module.encode_ids([3, -1], [1, 1])
    with pytest.raises(ValueError, match="0 true tokens among 2 ids"):
        module.encode_ids([3, 3], [0, 0])


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"text\.num_heads"):
        UMT5Shape(dim_attn=10, num_heads=4)


@pytest.mark.parametrize("layer", [0, 1])
def test_every_layer_has_positions_of_its_own(layer: int) -> None:
    module = encoder()
    ids, mask = prompt(9)
    before = module(ids, mask)
    module.state_dict()[f"blocks.{layer}.pos_embedding.embedding.weight"][1] += 1.0
    assert (module(ids, mask) - before).abs().max() > 1e-3


def test_a_bias_on_a_distance_that_never_occurs_changes_nothing() -> None:
    module = encoder()
    ids, mask = prompt(1)
    before = module(ids, mask)
    module.state_dict()["blocks.0.pos_embedding.embedding.weight"][1:] += 1.0
    assert torch.equal(module(ids, mask), before)


def test_bfloat16_stays_near_float32() -> None:
    module = encoder()
    ids, mask = prompt(4, 9)
    half = encoder().bfloat16()
    module.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    exact, rows = module(ids, mask), half(ids, mask)
    assert rows.dtype == torch.bfloat16
    assert torch.isfinite(rows).all()
    assert (rows.float() - exact).pow(2).mean().sqrt() < 0.01 * exact.pow(2).mean().sqrt()


def test_a_module_without_memory_takes_loaded_tensors_as_they_are() -> None:
    full = encoder()
    with torch.device("meta"):
        empty = UMT5Encoder(SHAPE, DIM)
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(full.state_dict(), assign=True)
    ids, mask = prompt(5)
    assert torch.equal(empty(ids, mask), full(ids, mask))


def test_the_published_size_has_its_number_of_parameters() -> None:
    with torch.device("meta"):
        module = UMT5Encoder(UMT5Shape(), 4096)
    per_layer = 4 * 4096 * 4096 + 3 * 4096 * 10_240 + 2 * 4096 + 32 * 64
    expected = 256_384 * 4096 + 24 * per_layer + 4096
    assert sum(p.numel() for p in module.parameters()) == expected == 5_680_910_336
    assert len(module.state_dict()) == 24 * 10 + 2


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the reference's fixtures are not beside this")
def test_the_reference_s_own_numbers() -> None:
    manifest = json.loads((FIXTURES / "umt5_encoder.json").read_text())
    tensors = load_file(FIXTURES / manifest["tensors_file"])
    sizes = {k: v for k, v in manifest["config"].items() if k in UMT5Shape.__dataclass_fields__}
    module = UMT5Encoder(UMT5Shape(**sizes), manifest["config"]["dim"])
    module.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("w.")})
    with torch.no_grad():
        rows = module(tensors["in.ids"], tensors["in.mask"])
    torch.testing.assert_close(rows, tensors["out.prompt_embeds"], atol=1e-5, rtol=1e-5)
    length = tensors["in.ids"].shape[1]
    assert torch.equal(relative_buckets(length, 32, 128), tensors["dbg.relative_buckets"])
