"""Models side by side: rows for each, figures that tell them apart, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from echo_ray.config import ModelSection
from echo_ray.errors import ConfigError, InvalidRequestError, ModelUnknown, WeightsError
from echo_ray.evaluation import compare
from echo_ray.evaluation.instruments import run_compare
from echo_ray.evaluation.report import Report, table
from echo_ray.evaluation.rollout import Plan
from echo_ray.evaluation.statistics import Rate
from echo_ray.evaluation.variants import Variant
from echo_ray.preset import PRESETS, load_preset

TINY = PRESETS / "echo-tiny"
CUT = [f"one, {variant.value}" for variant in list(Variant)[1:]]
FIGURES = [
    "colour recalled, 4 chunks hidden",
    "colour recalled, 5 chunks hidden",
    "an object came back, 4 chunks hidden",
    "an object came back, 5 chunks hidden",
    "one object: background",
    "one object: colour",
    "one object: shape",
    "prompt right in chunks 7 to 9",
]


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "HIDDEN", (4, 5))
    monkeypatch.setattr(compare, "STREAM", 9)


def value(report: Report, figure: str, row: str) -> float:
    found = report.figures[figure][row]
    assert isinstance(found, Rate)
    assert found.cases > 0
    return found.value


def test_on_real_engines_there_is_a_row_for_each_model_and_each_tier(
    small_subject: Any, tmp_path: Path
) -> None:
    other = replace(small_subject, modules=replace(small_subject.modules, digest="other"))
    subjects = {"one": small_subject, "two": other}
    report, (data, picture) = run_compare(subjects, Plan(cases=2), tmp_path, ["x"])
    assert list(report.figures) == [*FIGURES, "fingerprint"]
    for rows in report.figures.values():
        assert list(rows) == ["one", *CUT, "two"]
    assert len(set(report.figures["fingerprint"].values())) == 5
    body = json.loads(data.read_text())
    assert (data.name, picture.name) == ("compare.json", "compare.png")
    assert body["model"]["fingerprint"] == small_subject.engine().fingerprint
    assert {case["model"] for case in body["cases"]} == {"one", *CUT, "two"}
    kinds = [case["kind"] for case in body["cases"] if case["model"] == "two"]
    assert kinds == ["return"] * 4 + ["prompt"] * 2
    assert FIGURES[0] in table(report)
    with Image.open(picture) as opened:
        assert min(opened.size) > 200


def test_models_are_told_apart(oracle_with: Callable[..., Any]) -> None:
    first = oracle_with()
    first.engines = lambda variant, points: oracle_with(remembers=variant is Variant.WHOLE).engine()

    def fading(scene: Any, age: int) -> Any:
        return scene.emptied if age > 6 else scene

    report = compare.measure({"one": first, "worn": oracle_with(fading)}, Plan(cases=4, seed=3))
    for figure in FIGURES:
        assert value(report, figure, "one") == 1
    for row in CUT:
        assert value(report, FIGURES[0], row) < 1
        assert value(report, FIGURES[2], row) == 1
        assert value(report, FIGURES[5], row) == 1
    assert value(report, FIGURES[5], "worn") == 1
    assert value(report, FIGURES[-1], "worn") == pytest.approx(1 / 3)


def test_a_first_model_without_memory_is_refused_and_a_later_one_is_not(
    oracle_with: Callable[..., Any],
) -> None:
    plain, whole = oracle_with(), oracle_with()
    plain.preset = replace(plain.preset, cache=replace(plain.preset.cache, memory=None))
    with pytest.raises(ConfigError, match="--model one: its preset echo-tiny has no memory"):
        compare.measure({"one": plain, "two": whole}, Plan(cases=1))
    report = compare.measure({"two": whole, "one": plain}, Plan(cases=1))
    assert "one" in report.figures[FIGURES[0]]


def test_other_worlds_are_refused(oracle_with: Callable[..., Any], tmp_path: Path) -> None:
    other = oracle_with()
    other.preset = load_preset("echo-infinity-1.3b")
    subjects = {"one": oracle_with(), "two": other}
    with pytest.raises(ConfigError, match="no detector for the videos of preset echo-infinity"):
        run_compare(subjects, Plan(cases=1), tmp_path, ["x"])
    assert not list(tmp_path.iterdir())


def test_models_are_named_by_preset_or_folder(tmp_path: Path) -> None:
    config = ModelSection(device="cpu", threads=2)
    words = ["shipped=echo-tiny", f"trained-1.0={TINY}"]
    for file in ("manifest.json", "weights.safetensors"):
        (tmp_path / file).symlink_to(TINY / file)
    models = compare.named_models([*words, f"bare={tmp_path}"], config)
    assert models == {
        "shipped": config,
        "trained-1.0": replace(config, preset=str(TINY)),
        "bare": replace(config, weights=str(tmp_path)),
    }


@pytest.mark.parametrize(
    ("words", "error", "reason"),
    [
        ([], InvalidRequestError, "no model is named; give --model NAME=FOLDER"),
        (["echo-tiny"], InvalidRequestError, "'echo-tiny': write it as NAME=FOLDER"),
        (["a="], InvalidRequestError, "'a=': write it as NAME=FOLDER"),
        (["=echo-tiny"], InvalidRequestError, "write it as NAME=FOLDER"),
        (["a, b=echo-tiny"], InvalidRequestError, "a name is 1 to 24 letters"),
        (["a=echo-tiny", "a=echo-tiny"], InvalidRequestError, "the name a is given twice"),
        (["a=/nowhere"], InvalidRequestError, "/nowhere is no weights folder .* name a folder"),
        (["a=echo-infinity-1.3b"], ConfigError, "comes without weights"),
    ],
)
def test_models_that_cannot_be_named_are_refused(
    words: list[str], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        compare.named_models(words, ModelSection())


def test_weights_need_the_preset_that_was_configured(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(WeightsError, match="format is not"):
        compare.named_models([f"a={tmp_path}"], ModelSection())
    with pytest.raises(ModelUnknown, match="model 'nothing' is unknown"):
        compare.named_models([f"a={tmp_path}"], ModelSection(preset="nothing"))
