"""Low-rank training: what moves, what is merged, and what a published adapter would be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import small_preset
from training_rig import lively_model, losses_of, small_stage

from echo_ray.errors import ConfigError
from echo_ray.training.export import ADAPTER, write_weights
from echo_ray.training.lora import LoraLinear, adapter_tensors, add_lora, merged_tensors
from echo_ray.training.recipe import LoraSection
from echo_ray.training.trainable import new_codec
from echo_ray.weights.folder import WeightsFolder
from echo_ray.weights.lora import LINEARS, apply_lora
from echo_ray.weights.modules import load_modules


def trained(stage: str = "fewstep", steps: int = 2) -> object:
    made = small_stage(stage, lora={"rank": 2, "alpha": 4.0}, optimizer={"lr": 1e-2})
    losses_of(made, steps)
    return made


def test_a_fresh_adapter_changes_nothing() -> None:
    model = lively_model(small_preset())
    x, text = torch.randn(1, 5, 16), torch.randn(1, 6, 16)
    block = model.dit.blocks[0]
    with torch.no_grad():
        before = block.ffn(x), model.dit.encode_prompt(text).layers[0][0]
        add_lora(model.dit, LoraSection(rank=2))
        after = block.ffn(x), model.dit.encode_prompt(text).layers[0][0]
    assert isinstance(block.ffn[0], LoraLinear)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_only_the_adapter_and_the_memory_learn() -> None:
    start = small_stage("fewstep", lora={"rank": 2})
    before = {k: v.clone() for k, v in start.model.state_dict().items()}
    stage = small_stage("fewstep", lora={"rank": 2}, optimizer={"lr": 1e-2})
    losses_of(stage, 3)
    after = stage.model.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert any(k.startswith("memory.") for k in moved)
    assert {
        k.rpartition(".lora_")[0].partition("blocks.")[2][2:] for k in moved if "lora_" in k
    } == set(LINEARS)
    assert not [k for k in moved if "lora_" not in k and not k.startswith("memory.")]


def test_what_is_written_is_what_merging_the_published_adapter_gives(tmp_path: Path) -> None:
    stage = trained()
    model = stage.average.model  # type: ignore[attr-defined]
    base = {
        k.removeprefix("dit."): v
        for k, v in model.state_dict().items()
        if k.startswith("dit.") and "lora_" not in k
    }
    adapter = adapter_tensors(model.dit)
    assert "base_model.model.blocks.1.self_attn.q.lora_A.weight" in adapter
    assert len(adapter) == 2 * len(LINEARS) * len(model.dit.blocks)
    expected = apply_lora(base, adapter, alpha=4.0)
    found = merged_tensors(model)
    assert any(not torch.equal(expected[k], base[k]) for k in base)
    for key, value in expected.items():
        assert torch.equal(found[f"dit.{key}"], value), key
    preset = small_preset()
    write_weights(preset, model, new_codec(preset), tmp_path)
    modules = load_modules(preset, WeightsFolder.open(tmp_path), torch.device("cpu"))
    for key, value in modules.dit.state_dict().items():
        assert torch.equal(value, expected[key].half().float()), key
    written = load_file(tmp_path / ADAPTER)
    assert written.keys() == adapter.keys()


def test_the_merged_model_makes_what_the_trained_one_makes() -> None:
    layer = torch.nn.Linear(6, 4)
    lora = LoraLinear(layer, LoraSection(rank=2, alpha=6.0))
    torch.nn.init.normal_(lora.lora_B.weight)
    x = torch.randn(3, 6)
    with torch.no_grad():
        expected = torch.nn.functional.linear(x, lora.merged_weight(), layer.bias)
        assert torch.allclose(lora(x), expected, atol=1e-6)
        assert not torch.allclose(layer(x), expected, atol=1e-2)


def test_the_critic_of_a_low_rank_student_is_low_rank_too() -> None:
    stage = small_stage(
        "fewstep", lora={"rank": 2}, rollout={"objective": "dmd"}, dmd={"teacher": "nowhere"}
    )
    names = [n for n, p in stage.dmd.critic.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in name for name in names)


def test_an_impossible_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora\.rank: 0"):
        LoraSection(rank=0)
    with pytest.raises(ConfigError, match=r"lora\.alpha"):
        LoraSection(rank=1, alpha=0.0)
