"""Reading chunks back: what counts as an object."""

from __future__ import annotations

import numpy as np
import pytest

from echo_ray.evaluation import rollout
from echo_ray.evaluation.cases import draw_scene, true_clip
from echo_ray.evaluation.rollout import LEAST_CONFIDENCE, look, vote
from echo_ray.preset import load_preset
from echo_ray.scenes.detector import Seen, SeenObject, detect
from echo_ray.session.engine_port import stream_shape

FRAME = np.zeros((1, 64, 64, 3), np.uint8)


def thing(colour: str, confidence: float) -> SeenObject:
    return SeenObject(
        colour=colour,
        shape="ball",
        size="big",
        x=20.0,
        y=20.0,
        radius=13.0,
        inside=1.0,
        colour_confidence=confidence,
        shape_confidence=0.0,
    )


def test_a_smear_has_no_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = (thing("red", LEAST_CONFIDENCE - 0.01), thing("green", LEAST_CONFIDENCE))
    seen = Seen(background="black", background_confidence=1.0, objects=objects, unexplained=0.0)
    monkeypatch.setattr(rollout, "detect", lambda frames: [seen] * len(frames))
    reading = vote(look(np.repeat(FRAME, 3, axis=0)))
    # However unsure its shape is.
    assert (reading.count, reading.colour, reading.things) == (1, "green", (("green", "ball"),))
    assert reading.background == "black"


@pytest.mark.parametrize("objects", [1, 2])
def test_nothing_of_a_true_clip_is_a_smear(objects: int) -> None:
    shape = stream_shape(load_preset("echo-tiny"))
    for case in range(6):
        rng = np.random.default_rng([case, objects])
        clip, _ = true_clip(rng, [draw_scene(rng, objects)] * 2, shape)
        assert look(clip) == detect(clip)
