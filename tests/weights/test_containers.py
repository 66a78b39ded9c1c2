"""Published checkpoint files: every container is read, nothing in one is executed."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from echo_ray.errors import WeightsError
from echo_ray.weights.containers import (
    WRAPPERS,
    plain_key,
    plain_state,
    read_adapter,
    read_container,
    read_generator,
    read_memory,
    read_state,
)

A, B, C = torch.arange(4.0), torch.full((2, 3), 2.0), torch.full((3,), 7.0)
LORA_KEY = "base_model.model.blocks.0.ffn.0.lora_A.weight"


class Code:
    """What a file that wants to run something looks like to a pickle reader."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.made),)


def saved(tmp_path: Path, content: Any, name: str = "x.pt") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def test_a_pickle_with_code_does_run_when_read_carelessly(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Code(tmp_path / "made")))
    assert (tmp_path / "made").exists()


def write_bare(file: Path, code: Code) -> None:
    file.write_bytes(pickle.dumps({"generator": code}))


def write_old_bare(file: Path, code: Code) -> None:
    file.write_bytes(pickle.dumps(code, protocol=2))


def write_zip(file: Path, code: Code) -> None:
    torch.save({"generator": {"model.a": A, "b": code}}, file)


def write_legacy(file: Path, code: Code) -> None:
    torch.save({"generator": code}, file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (write_bare, "is a bare pickle"),
        (write_old_bare, "is a bare pickle"),
        (write_zip, "asks for .*mkdir"),
        (write_legacy, "asks for .*mkdir"),
    ],
)
@pytest.mark.parametrize("read", [read_container, read_generator, read_adapter, read_memory])
def test_code_in_a_file_is_refused_and_not_executed(
    tmp_path: Path,
    write: Callable[[Path, Code], None],
    said: str,
    read: Callable[[Path], object],
) -> None:
    write(tmp_path / "x.pt", Code(tmp_path / "made"))
    with pytest.raises(WeightsError, match=said + r".*; refused, and nothing in it was executed"):
        read(tmp_path / "x.pt")
    assert not (tmp_path / "made").exists()


def test_tensors_of_a_zip_file_are_mapped_not_read(tmp_path: Path) -> None:
    file = saved(tmp_path, {"a": torch.zeros(1000)})
    tensor = read_container(file)["a"]
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "x.pt" in line]
    ranges = [[int(n, 16) for n in line.split()[0].split("-")] for line in mapped]
    assert any(first <= tensor.data_ptr() < last for first, last in ranges)


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_torch_and_safetensors_are_read(tmp_path: Path, zipped: bool) -> None:
    torch.save({"a": A}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    save_file({"a": A}, tmp_path / "x.safetensors")
    assert torch.equal(read_state(tmp_path / "x.pt")["a"], A)
    assert torch.equal(read_state(tmp_path / "x.safetensors")["a"], A)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, zipped: bool, share: float) -> None:
    file = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(500)}, file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(WeightsError, match=r"truncated or damaged|begins like none|is a bare"):
        read_container(file)


def test_a_truncated_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(500)}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    for length in (4, 20, 900):
        (tmp_path / "x.safetensors").write_bytes(whole[:length])
        with pytest.raises(WeightsError, match="truncated, or not a safetensors file"):
            read_container(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "content",
    [b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
     b"PK\x03\x04 but nothing more", b"\x80\x04garbage", b"\x00" * 64],
)  # fmt: skip
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=r"x\.pt: "):
        read_container(tmp_path / "x.pt")


@given(content=st.binary(max_size=200), legacy=st.booleans())
def test_any_bytes_give_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, legacy: bool
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.pt"
    start = io.BytesIO()
    torch.save({}, start, _use_new_zipfile_serialization=False)
    file.write_bytes((start.getvalue()[:15] if legacy else b"") + content)
    with pytest.raises(WeightsError):
        read_container(file)


@given(content=st.binary(max_size=100))
def test_any_bytes_inside_a_zip_give_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "any_zip.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/version", "3")
        archive.writestr("x/byteorder", "little")
        archive.writestr("x/data.pkl", content)
    with pytest.raises(WeightsError):
        read_container(file)


def test_files_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match="No such file"):
        read_container(tmp_path / "gone.pt")
    with pytest.raises(WeightsError, match="is a folder"):
        read_container(tmp_path)
    (tmp_path / "empty.pt").touch()
    with pytest.raises(WeightsError, match="is empty"):
        read_container(tmp_path / "empty.pt")
    with pytest.raises(WeightsError, match="holds a list"):
        read_container(saved(tmp_path, [A]))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(WeightsError, match="Permission denied"):
        read_container(tmp_path / "x.pt")


NAMES = st.lists(st.sampled_from(["blocks", "0", "q", "weight", "model"]), min_size=1, max_size=5)


@given(names=NAMES, data=st.data())
def test_wrapper_names_anywhere_leave_the_key_as_it_was(names: list[str], data: Any) -> None:
    plain = plain_key(".".join(names))
    wrapped = list(names)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(wrapped) - 1))
        wrapped.insert(at, data.draw(st.sampled_from(sorted(WRAPPERS))))
    leading = data.draw(st.lists(st.sampled_from(["model", "module"]), max_size=2))
    assert plain_key(".".join(leading + wrapped)) == plain
    assert plain_key(plain) == plain


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        ("model.blocks.0.self_attn.q.weight", "blocks.0.self_attn.q.weight"),
        ("model._fsdp_wrapped_module.blocks.3._fsdp_wrapped_module.modulation",
         "blocks.3.modulation"),
        ("module.model._orig_mod.blocks.0._checkpoint_wrapped_module.ffn.0.bias",
         "blocks.0.ffn.0.bias"),
        ("model.query_memory_encoder.query_init", "query_memory_encoder.query_init"),
        ("encoder.model.weight", "encoder.model.weight"),
        ("model", "model"),
    ],
)  # fmt: skip
def test_keys_become_plain(key: str, plain: str) -> None:
    assert plain_key(key) == plain


def test_two_keys_that_become_one_must_hold_the_same() -> None:
    twice = {"model.a": A, "model._orig_mod.a": A.clone()}
    assert list(plain_state(twice, Path("x"))) == ["a"]
    for other in (A + 1, A.double(), torch.zeros(5)):
        with pytest.raises(WeightsError, match=r"'model\.a' and 'a' are both 'a'"):
            plain_state({"model.a": A, "a": other}, Path("x"))


def test_values_that_are_not_tensors_are_refused() -> None:
    with pytest.raises(WeightsError, match="'b' is a int, not a tensor"):
        plain_state({"a": A, "b": 3}, Path("x"))


STATE = {"model.a": A, "model.query_memory_encoder.m": C}
GENERATORS: dict[str, dict[str, Any]] = {
    "generator": {"generator": STATE, "critic": {"c": B}, "step": 3},
    "model": {"model": STATE, "optimizer": [1, 2]},
    "bare": STATE,
    "only the average": {"generator_ema": STATE},
    "wrapped": {
        "generator": {
            "model._fsdp_wrapped_module.a": A,
            "model._fsdp_wrapped_module.query_memory_encoder.m": C,
        }
    },
    "memory beside": {"generator": {"model.a": A}, "query_memory_encoder": {"m": C}},
    "memory inside and beside": {"generator": STATE, "query_memory_encoder": {"m": C.clone()}},
}


@pytest.mark.parametrize("content", GENERATORS.values(), ids=GENERATORS)
def test_every_generator_container_is_read(tmp_path: Path, content: dict[str, Any]) -> None:
    generator = read_generator(saved(tmp_path, content))
    assert list(generator.dit) == ["a"]
    assert torch.equal(generator.dit["a"], A)
    assert list(generator.memory) == ["m"]
    assert torch.equal(generator.memory["m"], C)


def test_the_average_is_taken_on_demand_with_the_trained_memory(tmp_path: Path) -> None:
    content = {"generator": STATE, "generator_ema": {"model._fsdp_wrapped_module.a": A + 1}}
    file = saved(tmp_path, content)
    assert torch.equal(read_generator(file).dit["a"], A)
    averaged = read_generator(file, ema=True)
    assert torch.equal(averaged.dit["a"], A + 1)
    assert torch.equal(averaged.memory["m"], C)
    assert averaged.notes == ["generator_ema"]
    without = read_generator(saved(tmp_path, {"generator": STATE}), ema=True)
    assert torch.equal(without.dit["a"], A)
    assert without.notes == ["generator, as there is no generator_ema"]


def test_a_memory_inside_the_average_gives_way_to_the_trained_one(tmp_path: Path) -> None:
    averaged = {"model.a": A, "model.query_memory_encoder.m": C + 1}
    file = saved(tmp_path, {"generator": STATE, "generator_ema": averaged})
    assert torch.equal(read_generator(file, ema=True).memory["m"], C)


def test_other_files_are_not_taken_for_a_generator(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is a LoRA, not a generator"):
        read_generator(saved(tmp_path, {"generator_lora": {LORA_KEY: B}}))
    with pytest.raises(WeightsError, match="is a LoRA, not a generator"):
        read_generator(saved(tmp_path, {LORA_KEY: B}))
    with pytest.raises(WeightsError, match="it holds 'optimizer', 'step'"):
        read_generator(saved(tmp_path, {"optimizer": {}, "step": 1}))
    different = {"generator": STATE, "query_memory_encoder": {"m": C + 1}}
    with pytest.raises(WeightsError, match="two different memory encoders"):
        read_generator(saved(tmp_path, different))


@pytest.mark.parametrize(
    "content",
    [
        {"m": C},
        {"query_memory_encoder": {"m": C}},
        {"query_memory_encoder.m": C},
        {"model.query_memory_encoder._orig_mod.m": C},
    ],
)
def test_a_memory_encoder_may_have_a_file_of_its_own(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    assert list(read_memory(saved(tmp_path, content))) == ["m"]


def test_adapters_are_read_with_and_without_container(tmp_path: Path) -> None:
    whole = {"generator_lora": {LORA_KEY: B}, "query_memory_encoder": {"m": C}, "step": 1}
    adapter = read_adapter(saved(tmp_path, whole))
    assert (list(adapter.lora), list(adapter.memory)) == ([LORA_KEY], ["m"])
    bare = read_adapter(saved(tmp_path, {LORA_KEY: B}))
    assert (list(bare.lora), bare.memory) == ([LORA_KEY], {})
    beside = read_adapter(saved(tmp_path, {LORA_KEY: B, "query_memory_encoder": {"m": C}}))
    assert (list(beside.lora), list(beside.memory)) == ([LORA_KEY], ["m"])
    with pytest.raises(WeightsError, match="not a LoRA: it holds 'generator'"):
        read_adapter(saved(tmp_path, {"generator": STATE}))


def test_a_state_may_lie_under_a_name(tmp_path: Path) -> None:
    for content in ({"a": A}, {"model": {"a": A}}, {"state_dict": {"a": A}, "epoch": 1}):
        assert list(read_state(saved(tmp_path, content))) == ["a"]
