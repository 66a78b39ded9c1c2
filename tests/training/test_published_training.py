"""The published model's way, scaled down: its own codec and prompt encoder, frozen, and a LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from converted import converted_model
from published import published_preset

from echo_ray.config import ModelSection
from echo_ray.engine.build import build_engine
from echo_ray.errors import ConfigError
from echo_ray.training.bank import caption_ids
from echo_ray.training.prompts import prompt_bank
from echo_ray.training.recipe import ClipsSection
from echo_ray.training.recipe_file import find_recipes, read_recipe
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
    later = [*words, 'init_from="{out}/dmd"', "streaming.clip_chunks=4", "ema.start=0"]
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


def test_prompts_alone_are_enough_for_distribution_matching(tmp_path: Path) -> None:
    model = converted_model(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "prompts.txt").write_text("a red fox | a blue fox\n\nrain\n", encoding="utf-8")
    words = [f"preset={model.preset}", "run.steps=2", "run.device=cpu"]
    folders = [f"init_from={model.weights}", f"dmd.teacher={model.weights}"]
    done = train(["echo-infinity/fewstep"], out, assignments=[*words, *folders])
    assert set(done[0].smooth) == {"student", "critic"}
    more = ["clips.chunks=13", "lora.rank=2", folders[1]]
    train(["echo-infinity/streaming"], out, assignments=[*words, *more])
    assert not list(out.glob("bank-*"))
    assert (out / "streaming" / "lora.safetensors").is_file()


def test_a_line_of_prompts_is_a_sample_that_switches(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("fox | hen|owl\n  \nrain\n", encoding="utf-8")
    bank = prompt_bank(published_preset(), ClipsSection(chunks=6), file)
    said = [[bank.captions[n] for n in clip] for clip in bank.ids_SKL[:, :, 0].tolist()]
    assert said == [["fox", "fox", "hen", "hen", "owl", "owl"], ["rain"] * 6]
    assert bank.latents_SFChw.shape == (2, 18, 4, 4, 4)
    with pytest.raises(ConfigError, match="a line has 3 prompts, a sample 2 chunks"):
        prompt_bank(published_preset(), ClipsSection(chunks=2), file)
    file.write_text(" | \n", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no prompt"):
        prompt_bank(published_preset(), ClipsSection(), file)
    with pytest.raises(ConfigError, match="cannot be read"):
        prompt_bank(published_preset(), ClipsSection(), tmp_path / "none.txt")


@pytest.mark.parametrize("name", ["teacher", "pretrain", "fewstep", "streaming"])
def test_prompts_alone_are_refused_by_whatever_learns_from_clips(name: str) -> None:
    with pytest.raises(ConfigError, match=r"clips\.prompts: 'p\.txt' is not allowed: only for"):
        read_recipe(find_recipes(name)[0], ["clips.prompts=p.txt"])


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
