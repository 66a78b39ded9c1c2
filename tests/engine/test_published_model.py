"""The published model's way through everything, scaled down: files, conversion, engine, resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from converted import Converted, converted_model

from echo_ray.config import ModelSection
from echo_ray.engine.build import build_engine
from echo_ray.engine.engine import EchoEngine
from echo_ray.errors import SnapshotForeign, WeightsError
from echo_ray.session.snapshot import decode, encode
from echo_ray.weights.text import UMT5Prompts

PROMPT = "a long road through the mountains"
SWITCHES = {3: ["the same road in winter"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return converted_model(tmp_path_factory.mktemp("model"))


def engine_of(model: Converted, **settings: object) -> EchoEngine:
    section = {"preset": str(model.preset), "weights": str(model.weights), **settings}
    return build_engine(ModelSection(**section))  # type: ignore[arg-type]


def text_of(engine: EchoEngine) -> UMT5Prompts:
    text = engine._modules.text
    assert isinstance(text, UMT5Prompts)
    return text


def run(engine: EchoEngine, chunks: int = 7) -> tuple[list[str], dict[int, bytes]]:
    state, digests, points = engine.open(PROMPT, 1), [], {}
    for index in range(chunks):
        digests.append(engine.step(state, SWITCHES.get(index, ())).digest)
        if state.at_point:
            points[state.next_index] = encode(engine.save(state))
    return digests, points


@pytest.mark.parametrize("vae", [None, "wan", "tiny"])
def test_another_engine_goes_on_bit_for_bit(model: Converted, vae: str | None) -> None:
    engine = engine_of(model, vae=vae)
    assert (engine.shape.width, engine.shape.height) == (32, 32)
    digests, points = run(engine)
    assert len(set(digests)) == len(digests)
    for point, blob in points.items():
        fresh = engine_of(model, vae=vae)
        state = fresh.load(decode(blob))
        assert not text_of(fresh).loaded, "a snapshot carries its prompts' rows"
        rest = [fresh.step(state, SWITCHES.get(i, ())).digest for i in range(point, 7)]
        assert rest == digests[point:]


def test_a_snapshot_is_bound_to_the_codec_that_made_it(model: Converted) -> None:
    wan, tiny = engine_of(model, vae="wan"), engine_of(model, vae="tiny")
    assert engine_of(model).load(decode(run(wan, 2)[1][2])).next_index == 2
    with pytest.raises(SnapshotForeign):
        tiny.load(decode(run(wan, 2)[1][2]))


def test_the_text_encoder_can_be_let_go_of(model: Converted) -> None:
    kept, dropped = engine_of(model), engine_of(model, keep_text_encoder=False)
    assert not text_of(kept).loaded
    assert run(kept)[0] == run(dropped)[0]
    assert text_of(kept).loaded
    assert not text_of(dropped).loaded


def test_a_model_that_reads_any_text_ignores_only_what_is_beyond_its_length(
    model: Converted,
) -> None:
    engine = engine_of(model)
    assert engine.step(engine.open("zxqv", 1)).ignored_words == ()
    long = engine.step(engine.open(" ".join(f"w{n}" for n in range(900)), 1)).ignored_words
    assert len(long) == 17
    assert long[-1] == "…"


def test_a_clip_is_encoded_by_the_model_s_own_encoder(model: Converted) -> None:
    for vae in ("wan", "tiny"):
        engine = engine_of(model, vae=vae)
        frames = bytes(9 * 32 * 32 * 3)
        given = engine.open(PROMPT, 1, frames).given_BGChw
        assert given.shape == (1, 3, 4, 4, 4)


def test_bfloat16_goes_the_same_way(tmp_path: Path) -> None:
    model = converted_model(tmp_path, dtype="bfloat16")
    digests, points = run(engine_of(model), chunks=5)
    fresh = engine_of(model)
    state = fresh.load(decode(points[4]))
    assert [fresh.step(state).digest] == digests[4:]


def test_a_folder_without_the_small_codec_says_so(tmp_path: Path) -> None:
    model = converted_model(tmp_path)
    without = Converted(model.preset, without_small_codec(model.weights))
    assert engine_of(without).shape.model == "published-small"
    with pytest.raises(WeightsError, match="small_codec"):
        engine_of(without, vae="tiny")


def without_small_codec(weights: Path) -> Path:
    (weights / "small_codec.safetensors").unlink()
    file = weights / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["files"]["small_codec.safetensors"]
    file.write_text(json.dumps(manifest))
    return weights


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model = converted_model(tmp_path)
    file = model.weights / "tokenizer" / "tokenizer.json"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightsError, match=r"tokenizer\.json"):
        engine_of(model)
