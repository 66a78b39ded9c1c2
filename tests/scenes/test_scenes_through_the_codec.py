"""The shipped codec keeps what a scene says: colours and shapes survive a round trip."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from echo_ray.model.group_codec import GroupCodec
from echo_ray.preset import load_preset, preset_folder
from echo_ray.scenes.detector import detect
from echo_ray.scenes.world import BACKGROUNDS, COLOURS, SHAPES, random_groups, render
from echo_ray.weights.folder import WeightsFolder
from echo_ray.weights.modules import load_modules


def test_colour_and_shape_survive_the_shipped_codec() -> None:
    preset = load_preset("echo-tiny")
    folder = WeightsFolder.open(preset_folder("echo-tiny"))
    codec = load_modules(preset, folder, torch.device("cpu")).codec
    assert isinstance(codec, GroupCodec)
    groups, stride = 120, 4
    frames = random_groups(np.random.default_rng(21), groups, stride, 64)
    # One object a scene: overlaps are the detector's own test.
    frames = replace(frames, visible_TO=frames.visible_TO & (np.arange(2) == 0))
    pixels = torch.from_numpy(render(frames, 64, 64)[0]).view(groups, 3 * stride, 64, 64)
    with torch.no_grad():
        latents = (codec.encoder(2 * pixels - 1) - codec.mean[:, None, None]) / codec.std[
            :, None, None
        ]
        drawn = codec.decode_groups(latents).clamp(0, 1).view(-1, 3, 64, 64).numpy()
    seen = detect(drawn)
    shown = frames.visible_TO[:, 0]
    colour = shape = 0
    for t, frame in enumerate(seen):
        assert frame.background == list(BACKGROUNDS)[frames.background_T[t]]
        assert len(frame.objects) == shown[t]
        for thing in frame.objects:
            colour += thing.colour == list(COLOURS)[frames.colour_TO[t, 0]]
            shape += thing.shape == SHAPES[frames.shape_TO[t, 0]]
    assert shown.sum() > 400
    assert colour / shown.sum() >= 0.98
    assert shape / shown.sum() >= 0.95
