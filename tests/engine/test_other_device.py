"""A second device without one: on `meta` a tensor that was made on the wrong device is an error."""

from __future__ import annotations

import pytest
import torch
from published import published_preset
from torch import Tensor

from echo_ray.engine.generator import Generator
from echo_ray.engine.noise import SessionNoise
from echo_ray.model.codec import Codec
from echo_ray.model.dit import DiT
from echo_ray.model.memory import MemoryEncoder
from echo_ray.model.umt5 import UMT5Encoder
from echo_ray.preset import with_codec
from echo_ray.weights.parts import build_parts, codec_part

META = torch.device("meta")


@pytest.mark.parametrize("vae", ["wan", "tiny"])
def test_nothing_leaves_the_model_s_device_or_type(vae: str) -> None:
    dtype = torch.bfloat16
    preset = with_codec(published_preset(), vae)
    with META:
        parts = {name: module.to(dtype) for name, module in build_parts(preset).items()}
    dit, memory, codec = parts["dit"], parts["memory"], parts[codec_part(preset.codec)]
    text = parts["text"]
    assert isinstance(dit, DiT)
    assert isinstance(memory, MemoryEncoder)
    assert isinstance(text, UMT5Encoder)
    assert isinstance(codec, Codec)
    generator = Generator(dit, memory, preset.cache, preset.sampler, codec.rebuild_latents)
    noise = SessionNoise(1, (1, 3, 4, 4, 4), META, dtype)
    with torch.no_grad():
        rows = text(
            torch.zeros(1, 12, dtype=torch.int64, device=META), torch.ones(1, 12, device=META)
        )
        state, decoder = generator.start(rows), codec.initial_state()
        generator.adopt(state, codec.encode(torch.zeros(1, 9, 3, 32, 32, device=META, dtype=dtype)))
        for chunk in range(1, 6):
            if chunk in (2, 5):
                generator.switch(state, rows)
            latents = generator.generate(state, noise)
            frames, decoder = codec.decode(latents, decoder)
        rebuilt = codec.rebuild(state.history_BFCHW, first=False)
        generator.rebuild(state)
    assert frames.device == META
    assert frames.dtype == torch.float32
    held: list[Tensor] = [rows, latents, state.history_BFCHW, state.sink_BFCHW]
    held += [t for name, t in decoder.items() if name != "begun"]
    assert {(t.device, t.dtype) for t in held} == {(META, dtype)}
    shapes = {name: (t.shape, t.dtype) for name, t in decoder.items()}
    assert {name: (t.shape, t.dtype) for name, t in rebuilt.items()} == shapes
