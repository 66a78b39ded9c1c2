"""A session opened with a clip: it is played, remembered, and continued."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import small_clip, small_engine, small_preset

from echo_ray.engine.engine import EchoEngine
from echo_ray.errors import InvalidRequestError
from echo_ray.session.snapshot import encode


def opened(engine: EchoEngine, clip: bytes, chunks: int, seed: int = 5) -> list[str]:
    state = engine.open("a red ball", seed, clip)
    return [engine.step(state).digest for _ in range(chunks)]


def test_the_clip_comes_first_and_decides_what_follows() -> None:
    engine = small_engine()
    clip, other = small_clip("group", 21), bytes(reversed(small_clip("group", 21)))
    with_clip, without = opened(engine, clip, 4), opened(engine, b"", 4)
    assert not set(with_clip) & set(without)
    # The clip's own chunks do not depend on the seed, what follows does.
    reseeded = opened(engine, clip, 4, seed=6)
    assert reseeded[:2] == with_clip[:2]
    assert not set(reseeded[2:]) & set(with_clip[2:])
    assert opened(engine, other, 4)[2:] != with_clip[2:]


@pytest.mark.parametrize("codec", ["group", "wan", "tiny"])
def test_its_chunks_are_the_clip_through_the_codec(codec: str) -> None:
    engine = small_engine(codec=codec)
    clip, preset = small_clip(codec, 21), small_preset(codec=codec)
    state = engine.open("a red ball", 5, clip)
    shown = [engine.step(state) for _ in range(2)]
    pixels = np.frombuffer(clip, np.uint8).reshape(1, 21, preset.height, preset.width, 3)
    frames = torch.from_numpy(pixels.copy()).permute(0, 1, 4, 2, 3).float() / 255
    with torch.inference_mode():
        model = engine._modules.codec
        video, _ = model.decode(model.encode(frames), model.initial_state())
    expected = (video[0].permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy().tobytes()
    assert b"".join(c.frames for c in shown) == expected
    assert "denoise" not in shown[0].stage_seconds


def test_frames_leave_the_window_for_the_memory_as_denoised_ones_do() -> None:
    engine = small_engine()
    state = engine.open("a red ball", 5, small_clip("group", 9 + 12 * 5))
    seen = []
    for _ in range(6):
        engine.step(state)
        seen.append(state.latent.has_history)
    # The window of twelve frames is full after four chunks.
    assert seen == [False] * 4 + [True] * 2


def test_a_snapshot_carries_what_is_left_of_the_clip_and_no_more() -> None:
    engine = small_engine(point_every=2)
    state = engine.open("a red ball", 5, small_clip("group", 9 + 12 * 3))
    sizes = [len(encode(engine.save(state)))]
    for _ in range(8):
        engine.step(state)
        if state.at_point:
            sizes.append(len(encode(engine.save(state))))
    latent = 4 * 4 * 4 * 4
    assert state.given_BGChw.shape[1] == 0
    # From the fourth chunk on the history is full and the clip is over.
    assert sizes[3] == sizes[4]
    assert len(engine.save(engine.open("a red ball", 5)).tensors["given"].data) == 0
    whole = engine.save(engine.open("a red ball", 5, small_clip("group", 9 + 12 * 3)))
    assert len(whole.tensors["given"].data) == 12 * latent


@pytest.mark.parametrize("frames", [1, 8, 10, 20])
def test_a_clip_that_is_not_whole_chunks_is_refused(frames: int) -> None:
    engine = small_engine()
    with pytest.raises(InvalidRequestError, match=r"not whole chunks.*give 9 frames"):
        engine.open("a red ball", 5, small_clip("group", frames))


def test_bytes_that_are_not_whole_frames_are_refused() -> None:
    engine = small_engine()
    with pytest.raises(InvalidRequestError, match="bytes are not whole chunks"):
        engine.open("a red ball", 5, small_clip("group", 9)[:-1])
