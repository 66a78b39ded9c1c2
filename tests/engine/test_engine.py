"""What the engine yields, what it refuses, and what it does not touch."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small import small_engine, small_preset

from echo_ray.config import ModelSection
from echo_ray.engine.build import build_engine, check_room, needed_bytes
from echo_ray.engine.fingerprint import numerics_of
from echo_ray.engine.room import session_parts
from echo_ray.errors import (
    ConfigError,
    DeviceMissing,
    InvalidRequestError,
    MemoryShort,
    ModelUnknown,
    PromptError,
    WeightsError,
)
from echo_ray.model.computing import Computing
from echo_ray.model.policies.choose import choose_policy
from echo_ray.preset import CacheShape, MemoryShape, load_preset, with_codec
from echo_ray.weights.folder import WeightsFolder
from echo_ray.weights.manifest import write_manifest
from echo_ray.weights.modules import build_modules, load_modules

WAN_DECODER_BYTES = 1_888_573_440
TAEHV_DECODER_BYTES = 67_092_480
"""In bfloat16 at 832 x 480: sums over the layers that look back, counted by hand."""


def test_frames_of_the_first_and_of_later_chunks() -> None:
    engine = small_engine()
    state = engine.open("a red ball", 3)
    chunks = [engine.step(state) for _ in range(3)]
    assert [c.index for c in chunks] == [0, 1, 2]
    assert [c.num_frames for c in chunks] == [9, 12, 12]
    shape = engine.shape
    for chunk in chunks:
        assert chunk.num_frames == shape.frames_in(chunk.index)
        assert len(chunk.frames) == chunk.num_frames * shape.height * shape.width * 3
        assert chunk.digest == hashlib.sha256(chunk.frames).hexdigest()
        assert set(chunk.stage_seconds) == {"denoise", "context", "decode", "drift"}
    assert shape.start_s(2) == (9 + 12) / 16


def test_the_last_of_several_switches_stands() -> None:
    one, both = small_engine(), small_engine()
    a, b = one.open("a red ball", 3), both.open("a red ball", 3)
    first = one.step(a, ("a green square",))
    second = both.step(b, ("a blue ball", "a green square"))
    assert first.prompt == second.prompt == "a green square"
    assert first.digest == second.digest


def test_a_chunk_names_the_words_that_its_own_prompt_wasted() -> None:
    engine, lovely = small_engine(point_every=2), "A lovely red ball, lovely at the sunset"
    assert engine.understood(lovely) == (["red", "ball"], ["lovely", "lovely", "at", "sunset"])
    state = engine.open(lovely, 3)
    named = [engine.step(state, ["a green box"] * (n == 1)).ignored_words for n in range(2)]
    assert named == [("lovely", "at", "sunset"), ()]
    engine.step(state, ["anything else"])
    engine.step(state)
    again = small_engine(point_every=2).load(engine.save(state))
    assert engine.step(state).ignored_words == ("anything", "else")
    assert small_engine(point_every=2).step(again).ignored_words == ("anything", "else")


def test_a_chunk_of_a_long_prompt_names_some_of_its_words() -> None:
    engine = small_engine()
    words = [chr(97 + n) * (n + 2) for n in range(20)]
    named = engine.step(engine.open(" ".join(words), 3)).ignored_words
    assert named == (*words[:16], "…")


def test_prompt_and_seed_matter() -> None:
    engine = small_engine()
    digests = {
        engine.step(engine.open(prompt, seed)).digest
        for prompt in ("a red ball", "a blue square")
        for seed in (1, 2)
    }
    assert len(digests) == 4


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(InvalidRequestError, match=str(seed)):
        small_engine().open("a red ball", seed)


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(prompt: str) -> None:
    engine = small_engine()
    with pytest.raises(PromptError, match="empty"):
        engine.open(prompt, 1)
    state = engine.open("a red ball", 1)
    with pytest.raises(PromptError, match="empty"):
        engine.step(state, (prompt,))


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    engine = small_engine()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = engine.step(engine.open("a red ball", 1)).digest
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert engine.step(engine.open("a red ball", 1)).digest == first


def test_unknown_preset_and_missing_device() -> None:
    with pytest.raises(ModelUnknown, match="echo-tiny"):
        build_engine(ModelSection(preset="echo-huge"))
    if not torch.cuda.is_available():
        with pytest.raises(DeviceMissing, match=r"model\.device: cuda .* sees 0 .* needs 1; use"):
            build_engine(ModelSection(device="cuda"))


def test_an_unknown_choice_of_kernels_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ECHO_KERNELS", "fast")
    with pytest.raises(ConfigError, match="ECHO_KERNELS: 'fast' is unknown; set it to reference"):
        build_engine(ModelSection())


def test_forcing_the_truth_is_part_of_a_gpus_numerics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    host, gpu = torch.device("cpu"), torch.device("cuda")
    found = []
    for value in ("", "reference"):
        monkeypatch.setenv("ECHO_KERNELS", value)
        found.append([numerics_of(d, d, 1, Computing()) for d in (gpu, host)])
    assert found[0][0] != found[1][0]
    assert found[0][1] == found[1][1]


def test_unknown_policies_and_a_window_with_memory_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cache\.policy: 'echoo'"):
        choose_policy(CacheShape(policy="echoo"))
    with pytest.raises(ConfigError, match=r"cache\.memory"):
        choose_policy(CacheShape(policy="window", memory=MemoryShape()))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    preset = small_preset()
    whole = {
        f"{name}.{key}": value.contiguous()
        for name, module in build_modules(preset).named().items()
        for key, value in module.state_dict().items()
    }
    cpu = torch.device("cpu")

    def folder_of(tensors: dict[str, torch.Tensor]) -> WeightsFolder:
        save_file(tensors, tmp_path / "weights.safetensors")
        write_manifest(tmp_path, preset, ["weights.safetensors"])
        return WeightsFolder.open(tmp_path)

    assert load_modules(preset, folder_of(whole), cpu).digest != "random"
    cases = {
        "missing": {k: v for k, v in whole.items() if k != "memory.query_init"},
        "surplus": whole | {"dit.more": torch.zeros(1)},
        "misshapen": whole | {"dit.head.modulation": torch.zeros(1, 2, 3)},
        "no weights of memory": {k: v for k, v in whole.items() if not k.startswith("memory.")},
    }
    for reason, tensors in cases.items():
        with pytest.raises(WeightsError, match=reason):
            load_modules(preset, folder_of(tensors), cpu)
    file = tmp_path / "weights.safetensors"
    folder = folder_of(whole)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightsError, match="damaged"):
        load_modules(preset, folder, cpu)
    file.write_bytes(data[:200])
    with pytest.raises(WeightsError, match="cut short"):
        WeightsFolder.open(tmp_path)


def test_a_preset_without_weights_asks_for_them() -> None:
    with pytest.raises(ConfigError, match=r"model\.weights.*convert"):
        build_engine(ModelSection(preset="echo-infinity-1.3b"))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    preset = small_preset()
    save_file({"dit.x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    write_manifest(tmp_path, preset, ["weights.safetensors"])
    with pytest.raises(WeightsError, match="weights of small, not of echo-tiny"):
        build_engine(ModelSection(weights=str(tmp_path)))


def test_a_model_that_does_not_fit_is_refused_before_it_is_read() -> None:
    cpu = torch.device("cpu")
    preset = load_preset("echo-infinity-1.3b")
    alone = needed_bytes(preset, with_text=False)
    weights = 1_418_996_800 + 68_570_112 + 126_892_531 + 11_315_539
    # A session at start-up is what admission counts.
    session, tiny = session_parts(preset), with_codec(preset, "tiny")
    assert session["decoder"] == WAN_DECODER_BYTES + 1
    assert session_parts(tiny)["decoder"] == TAEHV_DECODER_BYTES + 1
    assert alone == 2 * weights + sum(session.values())
    small = 2 * (weights - 126_892_531) + sum(session_parts(tiny).values())
    assert needed_bytes(tiny, with_text=False) == small
    assert needed_bytes(preset, with_text=True) - alone == 2 * 5_680_910_336
    with pytest.raises(MemoryShort, match=r"GiB on cpu.*free"):
        check_room(replace(preset, dit=replace(preset.dit, num_layers=300)), cpu, cpu)
