"""The seam's instrument: it finds the count that the structure promises, and sees a shorter one."""

from __future__ import annotations

import math

import pytest
import torch
from small import CODECS, small_preset

from echo_ray.cli import main
from echo_ray.evaluation.seam import measure, smooth_latents
from echo_ray.weights.parts import build_codec


@pytest.mark.parametrize("name", ["wan", "tiny"])
def test_it_tells_the_exact_count_from_the_one_below(name: str) -> None:
    dit = small_preset().dit
    torch.manual_seed(1)
    codec = build_codec(CODECS[name], dit).eval().requires_grad_(requires_grad=False)
    enough = codec.rebuild_latents
    latents = smooth_latents((enough + 6, 4, 4, 4), seed=2)
    few, short, exact = measure(codec, latents, (1, enough - 1, enough))
    assert (few.exact, short.exact, exact.exact) == (False, False, True)
    assert few.psnr_db < short.psnr_db <= exact.psnr_db == math.inf


def test_latents_change_slowly_and_keep_their_spread() -> None:
    latents = smooth_latents((400, 4, 4, 4), seed=1)[0].flatten(1)
    assert abs(float(latents.std()) - 1) < 0.05
    pair = torch.corrcoef(torch.stack([latents[:-1].flatten(), latents[1:].flatten()]))
    assert abs(float(pair[0, 1]) - 0.9) < 0.02


def test_the_command_prints_a_row_a_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["seam", "--vae", "tiny", "--size", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "weights: random, seed 0"
    assert lines[-1].split() == ["8", "inf", "yes"]
    assert [line.split()[-1] for line in lines[2:-1]] == ["no"] * 3


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--vae", "group"], "model.vae: 'group'"),
        (["--size", "0"], "--size 0: give 1 to 1024"),
        (["--width", "9999"], "--width 9999"),
        (["--weights", "/nowhere"], "/nowhere"),
    ],
)
def test_the_command_refuses(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["seam", *words]) == 2
    assert reason in capsys.readouterr().err
