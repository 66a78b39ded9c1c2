"""The streaming writer: a real safetensors file, and never two tensors at a time."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from echo_ray.errors import WeightsError
from echo_ray.weights import writer
from echo_ray.weights.writer import Entry, file_bytes, header, in_order, write_file, written_dtype


def entry(name: str, value: Tensor, dtype: torch.dtype | None = None) -> Entry:
    return Entry(name, written_dtype(value.dtype, dtype), tuple(value.shape), lambda: value)


def test_every_dtype_is_read_back_by_the_library(tmp_path: Path) -> None:
    tensors = {
        f"t.{str(dtype)[6:]}": torch.tensor([[0, 1, 2], [3, 1, 5]]).to(dtype)
        for dtype in writer.NAMES
    }
    tensors |= {"t.scalar": torch.tensor(2.5), "t.none": torch.zeros(0, 3)}
    entries = in_order(entry(name, value) for name, value in tensors.items())
    record = write_file(tmp_path / "x.safetensors", entries)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value), name
    data = (tmp_path / "x.safetensors").read_bytes()
    assert (record.bytes, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert file_bytes(entries) == len(data)


def test_the_header_is_padded_and_every_tensor_aligned() -> None:
    values = {"a": torch.zeros(3, dtype=torch.bfloat16), "bb": torch.zeros(1), "c": torch.ones(5)}
    data = header(in_order(entry(name, value) for name, value in values.items()))
    assert len(data) % 8 == 0
    assert int.from_bytes(data[:8], "little") == len(data) - 8
    table = json.loads(data[8:])
    begins = {name: table[name]["data_offsets"][0] for name in values}
    assert begins == {"bb": 0, "c": 4, "a": 24}


def test_floating_point_is_converted_and_whole_numbers_are_not(tmp_path: Path) -> None:
    value = torch.tensor([1.0, 1.00390625, 3.14159])
    entries = [
        entry("f", value, torch.bfloat16),
        entry("i", torch.tensor([7]), torch.bfloat16),
        entry("k", value.double()),
    ]
    write_file(tmp_path / "x.safetensors", in_order(entries))
    read = load_file(tmp_path / "x.safetensors")
    assert torch.equal(read["f"], value.bfloat16())
    assert read["i"].dtype == torch.int64
    assert read["k"].dtype == torch.float64


def test_views_that_are_not_contiguous_are_written_in_order(tmp_path: Path) -> None:
    value = torch.arange(6.0).reshape(2, 3).T
    write_file(tmp_path / "x.safetensors", [entry("a", value)])
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_name_their_tensor(tmp_path: Path, bad: float) -> None:
    entries = [entry("dit.a", torch.ones(3)), entry("dit.b", torch.tensor([1.0, bad]))]
    with pytest.raises(WeightsError, match=r"dit\.b: holds values that are not finite; the file"):
        write_file(tmp_path / "x.safetensors", entries)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 517, 1030])
def test_one_bad_value_is_found_in_every_dtype_and_place(
    tmp_path: Path, dtype: torch.dtype, bad: float, at: int
) -> None:
    value = torch.linspace(-3, 3, 1031).to(dtype)
    value[at] = bad
    with pytest.raises(WeightsError, match="not finite"):
        write_file(tmp_path / "x.safetensors", [entry("a", value)])


def test_values_that_a_dtype_cannot_hold_are_told_apart(tmp_path: Path) -> None:
    large = torch.tensor([1e300], dtype=torch.float64)
    with pytest.raises(WeightsError, match="once rounded to float32"):
        write_file(tmp_path / "x.safetensors", [entry("a", large, torch.float32)])


def test_a_bad_value_in_a_late_block_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_BLOCK_VALUES", 4)
    value = torch.ones(11)
    write_file(tmp_path / "good.safetensors", [entry("a", value)])
    assert torch.equal(load_file(tmp_path / "good.safetensors")["a"], value)
    value[10] = float("nan")
    with pytest.raises(WeightsError, match="a: holds"):
        write_file(tmp_path / "x.safetensors", [entry("a", value)])


def test_a_tensor_of_another_shape_than_planned_is_refused(tmp_path: Path) -> None:
    wrong = Entry("a", torch.float32, (3,), lambda: torch.zeros(4))
    with pytest.raises(WeightsError, match=r"a: \(4,\) instead of \(3,\)"):
        write_file(tmp_path / "x.safetensors", [wrong])


def test_a_dtype_that_the_format_lacks_is_refused() -> None:
    with pytest.raises(WeightsError, match="complex64 is not written"):
        header([entry("a", torch.zeros(1, dtype=torch.complex64))])


def test_an_existing_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "x.safetensors", [])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_writer_never_holds_two_tensors(tmp_path: Path, dtype: torch.dtype | None) -> None:
    made: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    def maker() -> Callable[[], Tensor]:
        def make() -> Tensor:
            alive.append(sum(ref() is not None for ref in made))
            # The array lives exactly as long as the memory of the tensor made of it.
            array = np.ones(5000, dtype=np.float32)
            made.append(weakref.ref(array))
            return torch.from_numpy(array)

        return make

    kind = written_dtype(torch.float32, dtype)
    entries = [Entry(f"t.{i}", kind, (5000,), maker()) for i in range(6)]
    write_file(tmp_path / "x.safetensors", entries)
    assert alive == [0] * 6
    assert all(ref() is None for ref in made)


def test_progress_adds_up_to_the_file(tmp_path: Path) -> None:
    told: list[int] = []
    record = write_file(tmp_path / "x.safetensors", [entry("a", torch.ones(9))], told.append)
    assert sum(told) == record.bytes
