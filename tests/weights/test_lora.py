"""A LoRA merged into the transformer: the sum, and every adapter that is not whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from echo_ray.errors import WeightsError
from echo_ray.weights.lora import LINEARS, apply_lora, lora_pairs, merged, rank_of

DIM, FFN, RANK, BLOCKS = 6, 10, 2, 2
Change = Callable[[dict[str, Tensor]], object]


def transformer() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {"head.head.weight": torch.randn(4, DIM, generator=generator)}
    for block in range(BLOCKS):
        for linear in LINEARS:
            shape = {"ffn.0": (FFN, DIM), "ffn.2": (DIM, FFN)}.get(linear, (DIM, DIM))
            key = f"blocks.{block}.{linear}"
            tensors[f"{key}.weight"] = torch.randn(shape, generator=generator)
            tensors[f"{key}.bias"] = torch.zeros(shape[0])
        tensors[f"blocks.{block}.self_attn.norm_q.weight"] = torch.ones(DIM)
    return tensors


def adapter(form: str = "base_model.model.{}.lora_{}.weight") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    lora = {}
    for key, value in transformer().items():
        if value.ndim == 2 and "blocks" in key:
            linear = key.removesuffix(".weight")
            lora[form.format(linear, "A")] = torch.randn(RANK, value.shape[1], generator=generator)
            lora[form.format(linear, "B")] = torch.randn(value.shape[0], RANK, generator=generator)
    return lora


FORMS = (
    "base_model.model.{}.lora_{}.weight",
    "base_model.model.{}.lora_{}.default.weight",
    "base_model.model.model.{}.lora_{}.weight",
    "{}.lora_{}.weight",
)


@pytest.mark.parametrize("form", FORMS)
def test_every_linear_of_the_blocks_is_changed_and_nothing_else(form: str) -> None:
    base, lora = transformer(), adapter(form)
    result = apply_lora(base, lora)
    assert result.keys() == base.keys()
    changed = {key for key in base if not torch.equal(result[key], base[key])}
    assert changed == {f"blocks.{n}.{linear}.weight" for n in range(BLOCKS) for linear in LINEARS}
    key = "blocks.1.ffn.2"
    a, b = (lora[form.format(key, side)].double() for side in "AB")
    expected = base[f"{key}.weight"].double() + b @ a
    torch.testing.assert_close(result[f"{key}.weight"].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("alpha", "share"), [(None, 1.0), (2.0, 1.0), (1.0, 0.5), (6.0, 3.0)])
def test_the_change_is_scaled_by_alpha_over_rank(alpha: float | None, share: float) -> None:
    base, lora = transformer(), adapter()
    change = apply_lora(base, lora, alpha)["blocks.0.ffn.0.weight"] - base["blocks.0.ffn.0.weight"]
    whole = apply_lora(base, lora)["blocks.0.ffn.0.weight"] - base["blocks.0.ffn.0.weight"]
    torch.testing.assert_close(change, whole * share, rtol=1e-5, atol=1e-5)


def test_the_sum_is_taken_in_float32_and_kept_in_the_weights_dtype() -> None:
    base = {k: v.bfloat16() for k, v in transformer().items()}
    lora = {k: v.bfloat16() * 2**-9 for k, v in adapter().items()}
    key = "blocks.0.self_attn.q"
    a, b = (lora[f"base_model.model.{key}.lora_{side}.weight"] for side in "AB")
    exact = base[f"{key}.weight"].double() + b.double() @ a.double()
    assert merged(base[f"{key}.weight"], a, b, 1.0).dtype == torch.float32
    result = apply_lora(base, lora)[f"{key}.weight"]
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, exact.float().bfloat16())


def first(lora: dict[str, Tensor], side: str = "A") -> str:
    return f"base_model.model.blocks.0.self_attn.q.lora_{side}.weight"


def put(key: str, value: Tensor) -> Change:
    return lambda lora: lora.__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lora: lora.pop(first(lora)), r"1 missing: blocks\.0\.self_attn\.q\.lora_A"),
        (lambda lora: lora.pop(first(lora, "B")), r"1 missing: blocks\.0\.self_attn\.q\.lora_B"),
        (lambda lora: lora.clear(), "40 missing: .* and 32 more"),
        (lambda lora: [lora.pop(k) for k in list(lora) if "blocks.1" in k], "20 missing"),
        (put("base_model.model.head.head.lora_A.weight", torch.zeros(2, 6)), "1 surplus"),
        (put("base_model.model.blocks.7.ffn.0.lora_A.weight", torch.zeros(2, 6)), "1 surplus"),
        (put("base_model.model.blocks.0.self_attn.q.lora_A.bias", torch.zeros(2)), "1 surplus"),
        (put("blocks.0.self_attn.q.lora_A.weight", torch.zeros(2, 6)), "1 surplus"),
        (put("blocks.0.self_attn.q.weight", torch.zeros(6, 6)), "1 surplus"),
        (put(first({}), torch.zeros(RANK, DIM + 1)), r"1 misshapen: blocks\.0\.self_attn\.q A"),
        (put(first({}, "B"), torch.zeros(DIM + 1, RANK)), "1 misshapen"),
        (put(first({}), torch.zeros(3, DIM)), "1 misshapen"),
        (put(first({}), torch.zeros(RANK)), "1 misshapen"),
        (put(first({}), torch.tensor(1.0)), "1 misshapen"),
    ],
)
def test_an_adapter_that_is_not_whole_is_refused(change: Change, said: str) -> None:
    lora = adapter()
    change(lora)
    with pytest.raises(WeightsError, match=said):
        apply_lora(transformer(), lora)


def test_one_adapter_has_one_rank() -> None:
    lora = adapter()
    lora[first(lora)], lora[first(lora, "B")] = torch.zeros(3, DIM), torch.zeros(DIM, 3)
    with pytest.raises(WeightsError, match="different ranks 2, 3"):
        apply_lora(transformer(), lora)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_alpha_must_be_positive(alpha: float) -> None:
    with pytest.raises(WeightsError, match="alpha"):
        apply_lora(transformer(), adapter(), alpha)


def test_a_model_without_blocks_takes_no_adapter() -> None:
    with pytest.raises(WeightsError, match="no blocks"):
        apply_lora({"head.head.weight": torch.zeros(2, 2)}, {})


def test_the_rank_is_read_from_the_shapes() -> None:
    shapes = {key: tuple(value.shape) for key, value in transformer().items()}
    assert rank_of(lora_pairs(shapes, adapter(), None, "x")) == RANK
