"""Metrics of other projects: said to be missing where they are, used as they want to be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from echo_ray.evaluation.external import ClipScore, VBench, known_metrics, measure, missing
from echo_ray.evaluation.report import table
from echo_ray.evaluation.rollout import Plan
from echo_ray.evaluation.statistics import Spread

FRAMES = np.full((12, 64, 64, 3), 90, dtype=np.uint8)


class Brightness:
    name = "brightness"

    def available(self) -> str | None:
        return None

    def score(self, frames_THWC: Any, prompt: str) -> dict[str, float]:
        assert prompt.startswith("a ")
        return {self.name: float(frames_THWC.mean()) / 255}


class Absent:
    name = "absent"

    def available(self) -> str | None:
        return "the moon is in the way"

    def score(self, frames_THWC: Any, prompt: str) -> dict[str, float]:
        raise AssertionError("asked although it is not there")


def test_what_is_there_is_used_and_what_is_not_says_why(oracle: Any) -> None:
    report = measure(oracle, Plan(cases=2), [Brightness(), Absent()])
    found = report.figures["scores"]["brightness"]
    assert isinstance(found, Spread)
    assert found.count == 2
    assert 0 < found.mean < 1
    assert report.figures["absent"] == {"absent": "not here"}
    assert table(report).endswith("absent: not measured: the moon is in the way")


def test_without_any_nothing_is_generated(oracle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "engines", lambda *a: pytest.fail("an engine was built"))
    report = measure(oracle, Plan(cases=2), [Absent()])
    assert report.cases == []
    assert [m.name for m in known_metrics()] == ["CLIP score", "VBench"]


def test_a_package_that_is_missing_is_named() -> None:
    assert missing("json") is None
    assert missing("no_such_package") == (
        "the package no_such_package is not installed; pip install no_such_package"
    )


def test_vbench_gets_a_video_and_its_own_list(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[dict[str, Any]] = []

    class Judge:
        def __init__(self, device: str, listing: str, out: str) -> None:
            assert Path(listing) == tmp_path / "VBench_full_info.json"
            self.out = Path(out)

        def evaluate(self, **kwargs: Any) -> None:
            assert Path(kwargs["videos_path"]).stat().st_size > 500
            calls.append(kwargs)
            self.out.mkdir()
            results = {"motion_smoothness": [0.9, [{"video_results": 0.9}]], "dynamic_degree": 1}
            (self.out / f"{kwargs['name']}_eval_results.json").write_text(json.dumps(results))

    fake = ModuleType("vbench")
    fake.__file__ = str(tmp_path / "__init__.py")
    fake.VBench = Judge  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vbench", fake)
    scores = VBench().score(FRAMES, "a red ball")
    assert scores == {"VBench motion_smoothness": 0.9, "VBench dynamic_degree": 1.0}
    assert calls[0]["mode"] == "custom_input"
    assert calls[0]["dimension_list"] == list(VBench.dimensions)


def fake_transformers(cosine: float, problem: Exception | None = None) -> ModuleType:
    """A package whose model finds every frame so similar to every text."""

    class Model:
        logit_scale = torch.tensor(np.log(50.0))

        def eval(self) -> Model:
            return self

        def __call__(self, images: Any) -> Any:
            return SimpleNamespace(logits_per_image=torch.full((images, 1), 50 * cosine))

    def load(name: str, local_files_only: bool) -> Any:
        assert local_files_only
        if problem:
            raise problem
        return Model()

    def processor(name: str, local_files_only: bool) -> Any:
        def process(text: list[str], images: list[Any], **kwargs: Any) -> dict[str, Any]:
            assert text == ["a red ball"]
            return {"images": len(images)}

        return process

    fake = ModuleType("transformers")
    fake.CLIPModel = SimpleNamespace(from_pretrained=load)  # type: ignore[attr-defined]
    fake.CLIPProcessor = SimpleNamespace(from_pretrained=processor)  # type: ignore[attr-defined]
    return fake


@pytest.mark.parametrize(("cosine", "score"), [(0.31, 31.0), (-0.2, 0.0)])
def test_the_clip_score_is_a_cosine(
    cosine: float, score: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", fake_transformers(cosine))
    found = ClipScore(every=5).score(FRAMES, "a red ball")
    assert found == {"CLIP score": pytest.approx(score)}


def test_clip_without_its_weights_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_transformers(0.1, OSError("not cached"))
    fake.__spec__ = SimpleNamespace(name="transformers")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "transformers", fake)
    reason = ClipScore().available()
    assert reason is not None
    assert "openai/clip-vit-base-patch32 cannot be read from the local cache" in reason
    assert "not cached" in reason
