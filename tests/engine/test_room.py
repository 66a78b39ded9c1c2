"""Memory of a GPU: what a session needs, and that one which finds none disturbs no other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small import small_engine, small_preset

from echo_ray.engine.engine import EchoEngine
from echo_ray.engine.footprint import state_bytes
from echo_ray.engine.live_bytes import LiveBytes
from echo_ray.engine.room import Room, decoder_bytes, free_bytes, room_of, session_parts
from echo_ray.errors import CapacityError, DeviceFull, EngineError
from echo_ray.preset import load_preset, with_codec


class Device:
    """Stands for a GPU's memory."""

    def __init__(self, free: int) -> None:
        self.free = free

    def __call__(self) -> int:
        return self.free


@pytest.fixture
def device() -> Device:
    return Device(10**12)


@pytest.fixture
def engine(device: Device) -> EchoEngine:
    made = small_engine(point_every=2)
    made._arrivals._room = Room(small_preset(point_every=2), "cuda", device)
    return made


def test_a_session_of_the_published_model_as_counted() -> None:
    preset = load_preset("echo-infinity-1.3b")
    whole = session_parts(preset)
    assert whole["window"] == 2 * 30 * (3 * 12 + 2 * 3) * 1560 * 1536
    assert whole["memory"] == 2 * 3 * 4680 * 1536
    assert whole["prompts"] == 2 * 94_371_840
    assert whole["decoder"] == 1_888_573_440 + 1
    hidden = 12 * 1560 * 8960 * 2
    assert whole["forward"] >= 2 * hidden
    # The last level's pictures, 96 channels of four frames: a block's way round, its branch normed
    # and in the making, and the branch behind its past in one piece.
    picture, joined = (2 * 96 * frames * 480 * 832 for frames in (4, 6))
    frames = 2 * 12 * 4 * 3 * 480 * 832
    assert 4 * picture + joined <= whole["decoding"] - frames <= 6 * picture + joined
    assert session_parts(with_codec(preset, "tiny"))["decoding"] < whole["decoding"]


def test_live_bytes_are_those_that_are_held_at_once() -> None:
    with torch.no_grad():
        before = torch.zeros(100)
        with LiveBytes() as counted:
            first = before + 1
            half = first.view(10, 10)[:5]
            del first
            assert (counted.live, counted.peak) == (400, 400)
            half.add_(before.view(10, 10)[:5])
            second = half * 2
            assert (counted.live, counted.peak) == (600, 600)
            del half, second
            assert (counted.live, counted.peak) == (0, 600)


def test_a_decoder_s_bytes_do_not_depend_on_who_asks() -> None:
    """A session comes back inside inference mode, and weights are loaded outside of it."""
    preset, found = small_preset(codec="wan"), set()
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            found.add(decoder_bytes(preset))
    assert len(found) == 1


@pytest.mark.parametrize("codec", ["group", "wan", "tiny"])
def test_what_is_counted_is_what_a_state_takes(codec: str) -> None:
    """All but latents, a few kilobytes, and what is held during a step only."""
    engine = small_engine(codec=codec)
    state = engine.open("a red ball", 1)
    for _ in range(7):
        engine.step(state, ["a blue square"] if state.next_index == 5 else [])
    parts = session_parts(small_preset(codec=codec))
    kept = sum(size for name, size in parts.items() if name not in ("forward", "decoding"))
    latents = sum(t.nbytes for t in (state.latent.history_BFCHW, state.latent.sink_BFCHW))
    assert 0.8 * (state_bytes(state) - latents) <= kept <= 1.5 * state_bytes(state)


def test_a_session_that_does_not_fit_is_refused_with_both_numbers(
    engine: EchoEngine, device: Device
) -> None:
    state = engine.open("a red ball", 1)
    needed = sum(session_parts(small_preset(point_every=2)).values())
    device.free = needed - 1
    with pytest.raises(DeviceFull) as caught:
        engine.open("a blue square", 2)
    told = caught.value.message
    assert f"needs {needed:,} bytes on cuda (window " in told
    assert f"{needed - 1:,} are free; sessions that run here go on; close some" in told
    assert (caught.value.code, caught.value.http_status) == ("device_full", 429)
    assert isinstance(caught.value, CapacityError)
    assert caught.value.retry_after_s
    alone = small_engine(point_every=2)
    lone = alone.open("a red ball", 1)
    for _ in range(3):
        assert engine.step(state).digest == alone.step(lone).digest
    device.free = needed
    assert engine.step(engine.open("a blue square", 2)).index == 0


def test_a_window_that_another_session_left_need_not_be_found(
    engine: EchoEngine, device: Device
) -> None:
    state = engine.open("a red ball", 1)
    parts = session_parts(small_preset(point_every=2))
    device.free = sum(parts.values()) - parts["window"]
    with pytest.raises(DeviceFull, match="window"):
        engine.open("a blue square", 2)
    engine.close(state)
    assert engine.step(engine.open("a blue square", 2)).index == 0
    with pytest.raises(DeviceFull, match="window"):
        engine.open("a red ball", 1)


def test_a_session_that_comes_back_is_refused_likewise(engine: EchoEngine, device: Device) -> None:
    state = engine.open("a red ball", 1)
    for _ in range(2):
        engine.step(state)
    snapshot = engine.save(state)
    device.free = 0
    with pytest.raises(DeviceFull, match=r"0 are free"):
        engine.load(snapshot)
    device.free = 10**12
    assert engine.step(engine.load(snapshot)).digest == engine.step(state).digest


def test_memory_in_pieces_is_told_as_no_memory(
    engine: EchoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(engine._generator, "start", short)
        with pytest.raises(DeviceFull, match=r"no room in one piece: .*allocate 2\.00"):
            engine.open("a red ball", 1)
    assert engine.step(engine.open("a red ball", 1)).index == 0


def test_a_step_that_runs_out_of_memory_fails_alone(
    engine: EchoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = small_engine(point_every=2)
    lone, one, two = alone.open("a red ball", 1), *(engine.open("a red ball", 1) for _ in range(2))

    def short(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(engine._modules.codec, "decode", short)
        with pytest.raises(EngineError, match=r"chunk 0 on cpu failed: CUDA out of memory.*2\.00"):
            engine.step(one)
    for _ in range(3):
        assert engine.step(two).digest == alone.step(lone).digest
    with pytest.raises(EngineError, match="load the state again"):
        engine.step(one)


def test_what_pytorch_holds_without_using_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 80_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    gpu = torch.device("cuda")
    assert free_bytes(gpu) == 1200
    room = room_of(replace(small_preset(), name="little"), gpu)
    with pytest.raises(DeviceFull, match=r"a session of little .* 1,200 are free"):
        room.check()
    room_of(small_preset(), torch.device("cpu")).check()
