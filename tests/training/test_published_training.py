"""The published model's way, scaled down: its own codec and prompt encoder, frozen, and a LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from converted import converted_model
from published import published_preset

from echo_ray.config import ModelSection
from echo_ray.engine.build import build_engine
from echo_ray.training.bank import caption_ids
from echo_ray.training.train import train
from echo_ray.training.trainable import CaptionTable
from echo_ray.weights.folder import WeightsFolder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_converted_model_is_fine_tuned_stage_by_stage_and_serves(
    tmp_path: Path, dtype: str
) -> None:
    model = converted_model(tmp_path, dtype=dtype)
    out = tmp_path / "out"
    words = [f"preset={model.preset}", "run.steps=2", "run.sheet_chunks=0", "lora.rank=2"]
    words += ["rollout.batch=1", "clips.count=2", "clips.chunks=6"]
    first = [*words, f"init_from={model.weights}", f"dmd.teacher={model.weights}"]
    train(["dmd"], out, assignments=[*first, "fewstep.chunks=5"])
    later = [*words, "streaming.clip_chunks=4", "ema.start=0"]
    train(["streaming"], out, assignments=later)
    before, after = (WeightsFolder.open(f) for f in (model.weights, out / "streaming"))
    after.check(before.manifest.config)
    changed = after.part("dit")["blocks.0.ffn.0.weight"].float()
    assert not torch.equal(changed, before.part("dit")["blocks.0.ffn.0.weight"].float())
    for part in ("text", "codec", "small_codec"):
        for key, value in before.part(part).items():
            assert torch.equal(after.part(part)[key], value), key
    engine = build_engine(ModelSection(preset=str(model.preset), weights=str(out / "streaming")))
    assert engine.step(engine.open("a red fox", 1)).frames


class Letters:
    """Rows of ones, as many as a prompt has letters."""

    def encode(self, prompt: str) -> torch.Tensor:
        rows = torch.zeros(1, 12, 3)
        rows[:, : len(prompt)] = 1.0
        return rows

    def understood(self, prompt: str) -> tuple[list[str], list[str]]:
        return prompt.split(), []


def test_a_table_gives_each_caption_the_rows_of_its_encoder() -> None:
    table = CaptionTable(3, 12)
    ids, captions = caption_ids(published_preset(), [["a", "abc"], ["abc", ""]])
    assert captions == ("", "a", "abc")
    assert ids[:, :, 0].tolist() == [[1, 2], [2, 0]]
    table.fill(captions, Letters())
    assert table.rows_UPE.shape == (3, 3, 3)
    rows = table(ids.flatten(0, 1).long())
    expected = torch.cat([Letters().encode(c) for c in ("a", "abc", "abc", "")])
    assert torch.equal(rows, expected)
    assert table.state_dict() == {}
