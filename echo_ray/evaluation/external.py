"""Metrics of other projects, if they are installed: VBench's dimensions, the CLIP score.

None is a dependency. An adapter says why it cannot be used here, or scores a clip.

Shapes: T frames, H W pixels.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from echo_ray.engine.clip import write_clip
from echo_ray.engine.frames import pixels
from echo_ray.evaluation.cases import caption, draw_scene
from echo_ray.evaluation.chart import Bar, Bars
from echo_ray.evaluation.report import Figure, Report
from echo_ray.evaluation.rollout import Plan, case_rng, counted, roll, session_seed
from echo_ray.evaluation.statistics import Spread
from echo_ray.evaluation.subject import Subject
from echo_ray.session.chunk import Chunk, DriftReading, frames_digest

CHUNKS = 6

Frames = NDArray[np.uint8]


class Metric(Protocol):
    """A metric of somebody else's."""

    @property
    def name(self) -> str: ...

    def available(self) -> str | None:
        """Why it cannot be used on this machine; None if it can."""
        ...

    def score(self, frames_THWC: Frames, prompt: str) -> dict[str, float]:
        """Figures of one clip, uint8 RGB, by name."""
        ...


def missing(package: str) -> str | None:
    """What to do about a package that is not installed; None if it is."""
    if importlib.util.find_spec(package) is not None:
        return None
    return f"the package {package} is not installed; pip install {package}"


class ClipScore:
    """100 x cosine of frame and prompt in CLIP's space, never below 0, as the mean over frames.

    Reads the model from the local cache only: nothing is downloaded behind anybody's back.
    """

    name = "CLIP score"

    def __init__(self, model: str = "openai/clip-vit-base-patch32", every: int = 4) -> None:
        self._model_name = model
        self._every = every
        self._loaded: tuple[Any, Any] | None = None

    def available(self) -> str | None:
        if reason := missing("transformers"):
            return reason
        try:
            self._load()
        except (OSError, ValueError, ImportError) as e:
            return f"{self._model_name} cannot be read from the local cache: {e}"
        return None

    def score(self, frames_THWC: Frames, prompt: str) -> dict[str, float]:
        model, processor = self._load()
        images = [Image.fromarray(frame) for frame in frames_THWC[:: self._every]]
        inputs = processor(
            text=[prompt], images=images, return_tensors="pt", padding=True, truncation=True
        )
        scale = float(model.logit_scale.exp())
        cosines = model(**inputs).logits_per_image.detach().flatten() / scale
        return {self.name: float((100 * cosines).clamp_min(0).mean())}

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            package = importlib.import_module("transformers")
            model = package.CLIPModel.from_pretrained(self._model_name, local_files_only=True)
            processor = package.CLIPProcessor.from_pretrained(
                self._model_name, local_files_only=True
            )
            self._loaded = model.eval(), processor
        return self._loaded


class VBench:
    """VBench's dimensions that need no prompt of its own list (its mode `custom_input`)."""

    name = "VBench"
    dimensions = (
        "subject_consistency",
        "background_consistency",
        "motion_smoothness",
        "dynamic_degree",
        "aesthetic_quality",
        "imaging_quality",
    )

    def __init__(self, device: str = "cpu", fps: int = 16) -> None:
        self._device = device
        self._fps = fps

    def available(self) -> str | None:
        return missing("vbench")

    def score(self, frames_THWC: Frames, prompt: str) -> dict[str, float]:
        package = importlib.import_module("vbench")
        listing = Path(str(package.__file__)).with_name("VBench_full_info.json")
        with tempfile.TemporaryDirectory() as folder:
            video, results = Path(folder) / "clip.mp4", Path(folder) / "results"
            write_clip(video, [_as_chunk(frames_THWC, prompt)], self._fps)
            package.VBench(self._device, str(listing), str(results)).evaluate(
                videos_path=str(video),
                name="clip",
                prompt_list=[prompt],
                dimension_list=list(self.dimensions),
                mode="custom_input",
            )
            found = json.loads((results / "clip_eval_results.json").read_text(encoding="utf-8"))
        return {f"{self.name} {name}": float(_first(value)) for name, value in found.items()}


def _first(value: Any) -> Any:
    """VBench gives a dimension's mean, with the videos' own scores behind it."""
    return value[0] if isinstance(value, Sequence) else value


def _as_chunk(frames_THWC: Frames, prompt: str) -> Chunk:
    data = frames_THWC.tobytes()
    count, height, width, _ = frames_THWC.shape
    return Chunk(0, data, count, height, width, frames_digest(data), DriftReading(0.0), prompt)


def known_metrics() -> tuple[Metric, ...]:
    return ClipScore(), VBench()


def measure(subject: Subject, plan: Plan, metrics: Sequence[Metric] | None = None) -> Report:
    """Score generated clips by every metric that is there, and say why the others are not."""
    wanted = known_metrics() if metrics is None else metrics
    reasons = {metric.name: metric.available() for metric in wanted}
    usable = [metric for metric in wanted if reasons[metric.name] is None]
    scores: dict[str, list[float]] = {}
    records: list[dict[str, Any]] = []
    if usable:
        engine = subject.engine()
        for index in counted("external", range(plan.cases), plan.cases):
            rng = case_rng("external", plan.seed, index)
            prompt = caption(draw_scene(rng, 1))
            chunks = roll(engine, {0: prompt}, session_seed(rng), CHUNKS)
            frames = np.concatenate([pixels(c) for c in chunks])
            found: dict[str, float] = {}
            for metric in usable:
                found |= metric.score(frames, prompt)
            for name, value in found.items():
                scores.setdefault(name, []).append(value)
            records.append({"prompt": prompt, "scores": found})
    return Report(
        what="external",
        title="Metrics of other projects",
        figures=_figures(scores, reasons),
        cases=records,
        panels=[
            Bars(name, [Bar(name, Spread.of(values).mean)], None)
            for name, values in scores.items()
        ] or [Bars("No metric is installed here", [Bar(name, 0.0, note="-") for name in reasons])],
        notes=[f"{name}: not measured: {why}" for name, why in reasons.items() if why],
    )  # fmt: skip


def _figures(
    scores: Mapping[str, Sequence[float]], reasons: Mapping[str, str | None]
) -> dict[str, dict[str, Figure]]:
    measured: dict[str, Figure] = {name: Spread.of(values) for name, values in scores.items()}
    absent: dict[str, Figure] = {name: "not here" for name, why in reasons.items() if why}
    return {"scores": measured, "absent": absent} if measured else {"absent": absent}
