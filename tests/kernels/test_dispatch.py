"""Which form of an op runs, what every op refuses, and what a failed kernel does."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_rig import KINDS
from torch import Tensor

import echo_kernels
from echo_kernels import Rows8, Slots, check_choice, dispatch, fallbacks
from echo_kernels.dispatch import Op
from echo_kernels.launch import Kernel, block_of

TABLE = torch.ones(4, 3, dtype=torch.complex128)


def op_of(kernel: Callable[[Tensor], Tensor] = lambda x: x + 2, name: str = "add") -> Op[Any, Any]:
    """An op whose truth adds one, and whose kernel adds two so that the two can be told apart."""

    def check(x: Tensor) -> None:
        dispatch.expect(name, "x", x, (2,))

    return Op(name, check, lambda x: x + 1, kernel)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ECHO_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "on_device", lambda tensors: True)


def test_tensors_of_the_host_take_the_truth() -> None:
    assert op_of()(torch.zeros(2)).tolist() == [1, 1]


@pytest.mark.usefixtures("on_device")
def test_tensors_of_the_device_take_the_kernel() -> None:
    for kind in KINDS:
        assert op_of()(torch.zeros(2, dtype=kind)).tolist() == [2, 2]


@pytest.mark.usefixtures("on_device")
def test_the_variable_forces_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHO_KERNELS", "reference")
    assert check_choice()
    assert op_of()(torch.zeros(2)).tolist() == [1, 1]
    monkeypatch.setenv("ECHO_KERNELS", "")
    assert not check_choice()


def test_the_variable_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHO_KERNELS", "triton")
    with pytest.raises(ValueError, match="ECHO_KERNELS: 'triton' is unknown; set it to reference"):
        check_choice()


@pytest.mark.usefixtures("on_device")
def test_what_kernels_cannot_do_takes_the_truth() -> None:
    add = op_of()
    wants = torch.zeros(2, requires_grad=True)
    with torch.enable_grad():
        assert add(wants).tolist() == [1, 1]
    assert add(wants).tolist() == [2, 2]
    with torch.autocast("cpu", torch.bfloat16):
        assert add(torch.zeros(2)).tolist() == [1, 1]
    assert add(torch.zeros(2, dtype=torch.float64)).tolist() == [1, 1]
    mixed = Op("mixed", lambda x, y: None, lambda x, y: "truth", lambda x, y: "kernel")
    assert mixed(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)) == "truth"
    assert mixed(torch.zeros(2), TABLE) == "kernel"
    by_nature = Op("mixed", lambda x: None, lambda x: "truth", lambda x: "kernel", mixed=True)
    assert by_nature(rows(2, 3)) == "kernel"


@pytest.mark.usefixtures("on_device")
def test_a_kernel_that_fails_falls_back_says_so_once_and_counts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried = []

    def broken(x: Tensor) -> Tensor:
        tried.append(x)
        raise RuntimeError("ptxas: unsupported")

    add = op_of(broken, "broken_add")
    with caplog.at_level(logging.WARNING, "echo_kernels"):
        for _ in range(3):
            assert add(torch.zeros(2)).tolist() == [1, 1]
    assert len(tried) == 1
    assert [r.getMessage() for r in caplog.records] == [
        "kernel broken_add failed, its truth runs from here on: ptxas: unsupported"
    ]
    assert fallbacks() == {"broken_add": 3}
    assert op_of()(torch.zeros(2)).tolist() == [2, 2]
    fallbacks().clear()
    assert fallbacks() == {"broken_add": 3}


@pytest.mark.usefixtures("on_device")
def test_memory_that_is_short_is_no_failed_kernel() -> None:
    def short(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    add = op_of(short, "short_add")
    with pytest.raises(torch.OutOfMemoryError):
        add(torch.zeros(2))
    assert fallbacks() == {}


def test_arguments_are_checked_on_every_path() -> None:
    with pytest.raises(ValueError, match=r"add: x is \[3\]; give \[2\]"):
        op_of()(torch.zeros(3))


def slots(batch: int = 1, tokens: int = 4, written: int = 4, **changed: Tensor) -> Slots:
    part = torch.zeros(batch, written, 2, 6)
    given = dict.fromkeys(Slots.__dataclass_fields__, part)
    return Slots(**(given | {"query_rope_NP": TABLE, "key_rope_KP": TABLE} | changed))


def z(*shape: int) -> Tensor:
    return torch.zeros(shape)


def rows(count: int, width: int, of: int = 0) -> Rows8:
    return Rows8(z(count, width).to(torch.float8_e4m3fn), z(of or count, 1))


X, FRAMES, WINDOW, PAST = z(1, 4, 12), z(1, 2, 12), z(2, 1, 4, 2, 6), z(1, 3, 2, 4, 5)
REFUSED: list[tuple[str, tuple[Any, ...], str]] = [
    ("rms_norm", (X, z(11), 0.0), r"weight is \[11\]; give \[12\]"),
    ("layernorm_modulate", (X, z(1, 3, 12), z(1, 3, 12), 0.0), "N a multiple of F"),
    ("layernorm_modulate", (X, z(1, 0, 12), z(1, 0, 12), 0.0), "N a multiple of F"),
    ("layernorm_modulate", (X, z(2, 2, 12), z(2, 2, 12), 0.0), r"shift is \[2, 2, 12\]"),
    ("layernorm_modulate", (X, FRAMES, z(1, 1, 12), 0.0), r"scale is \[1, 1, 12\]"),
    ("residual_modulate", (X, z(1, 3, 12), None, FRAMES, FRAMES, 0.0), r"y is \[1, 3, 12\]"),
    ("residual_modulate", (X, X, z(1, 3, 12), FRAMES, FRAMES, 0.0), "gate"),
    ("residual_modulate", (X, X, None, FRAMES, z(1, 4, 12), 0.0), r"scale is \[1, 4, 12\]"),
    ("residual_layernorm", (X, X, None, z(6), z(12), 0.0), r"weight is \[6\]"),
    ("residual_layernorm", (X, X, None, z(12), z(6), 0.0), r"bias is \[6\]"),
    ("memory_gate_blend", (X, FRAMES, X), r"old is \[1, 2, 12\]"),
    ("memory_gate_blend", (X, X, FRAMES), r"candidate is \[1, 2, 12\]"),
    ("norm_silu_join", (z(1, 3, 2, 4), z(3), None, PAST), r"x is \[1, 3, 2, 4\]; give \[B, C, T"),
    ("norm_silu_join", (PAST[:, :, :0], z(3), None, PAST), r"x is \[1, 3, 0, 4, 5\]"),
    ("norm_silu_join", (PAST, z(2), None, PAST), r"gain is \[2\]; give \[3\]"),
    ("norm_silu_join", (PAST, z(3), PAST[:, :, :1], PAST), r"past is \[1, 3, 1, 4, 5\]"),
    ("norm_silu_join", (PAST, z(3), PAST, z(2, 3, 2, 4, 5)), r"kept is \[2, 3, 2, 4, 5\]; give"),
    ("frames_to_uint8", (z(3, 5, 7),), r"video is \[3, 5, 7\]; give \[N, K, H, W\]"),
    ("chunk_advance", (WINDOW, WINDOW, WINDOW, TABLE, 5), "5 slots cannot leave; 4 are held"),
    ("chunk_advance", (WINDOW, WINDOW, WINDOW, TABLE, -1), "-1 slots cannot leave"),
    ("chunk_advance", (WINDOW, WINDOW, WINDOW, TABLE, 1), r"rope is \[4, 3\]; give \[3, 3\]"),
    ("chunk_advance", (WINDOW, WINDOW[:1], WINDOW, TABLE, 0), r"keys is \[1, 1, 4, 2, 6\]"),
    ("chunk_advance", (z(2, 1, 2, 4, 6).mT, WINDOW, WINDOW, TABLE, 0), "keys is|strides"),
    ("place_memory", (WINDOW[0], WINDOW[1, :, :3], TABLE, WINDOW, WINDOW), r"v is \[1, 3, 2, 6\]"),
    ("place_memory", (WINDOW[0], WINDOW[0], TABLE[:2], WINDOW, WINDOW), r"rope is \[2, 3\]"),
    ("place_memory", (WINDOW[0], WINDOW[0], TABLE, WINDOW[:, :, :3], WINDOW), "keys is"),
    ("qk_norm_rope_write", (X, FRAMES, X, None, None, 0.0, slots()), r"k is \[1, 2, 12\]"),
    ("qk_norm_rope_write", (X, X, FRAMES, None, None, 0.0, slots()), r"v is \[1, 2, 12\]"),
    ("qk_norm_rope_write", (X, X, X, z(6), None, 0.0, slots()), r"weight_q is \[6\]"),
    ("qk_norm_rope_write", (X, X, X, None, z(6), 0.0, slots()), r"weight_k is \[6\]"),
    ("qk_norm_rope_write", (X, X, X, None, None, 0.0, slots(written=5)), "at most 4"),
    ("qk_norm_rope_write", (X, X, X, None, None, 0.0, slots(batch=2)), "raw_BKHD is"),
    ("qk_norm_rope_write", (X, X, X, None, None, 0.0, slots(query_rope_NP=z(2, 3))), "query_rope"),
    ("qk_norm_rope_write", (X, X, X, None, None, 0.0, slots(key_rope_KP=z(2, 3))), "key_rope"),
    ("layernorm_modulate8", (X, FRAMES, z(1, 1, 12), 0.0), r"scale is \[1, 1, 12\]"),
    ("residual_modulate8", (X, z(1, 3, 12), None, FRAMES, FRAMES, 0.0), r"y is \[1, 3, 12\]"),
    ("residual_layernorm8", (X, X, None, z(6), z(12), 0.0), r"weight is \[6\]"),
    ("rows8", (X.double(),), r"torch\.float64; give \[\.\.\., C\] of float32, bfloat16, float16"),
    ("gelu_rows8", (z(),), r"x is \[\] of torch\.float32"),
    ("heads8", (X, z(2)), r"x is \[1, 4, 12\].*give \[B, N, H, D\]"),
    ("heads8", (WINDOW[0], z(2).double()), r"scales are torch\.float64"),
    ("heads8", (WINDOW[0], z(3)), r"scales is \[3\]; give \[2\]"),
    ("heads8", (z(1, 4, 6, 2).mT, z(2)), "strides"),
    ("linear8", (rows(4, 11), rows(5, 12), None, KINDS[0]), r"x is \[4, 11\]; give \[4, 12\]"),
    ("linear8", (rows(4, 12, of=3), rows(5, 12), None, KINDS[0]), r"scales of x is \[3, 1\]"),
    ("linear8", (rows(4, 12), rows(5, 12, of=4), None, KINDS[0]), r"scales of weight is \[4, 1\]"),
    ("linear8", (rows(4, 12), rows(5, 12), z(4), KINDS[0]), r"bias is \[4\]"),
    ("linear8", (Rows8(z(4, 12), z(4, 1)), rows(5, 12), None, KINDS[0]), "x is torch.float32"),
    ("linear8", (rows(4, 12), rows(5, 12), None, torch.float64), r"kind is torch\.float64"),
    (
        "qk_norm_rope_write",
        (X, X, X, None, None, 0.0, slots(values_BKHD=z(1, 4, 6, 2).mT)),
        r"values_BKHD has strides \[48, 12, 1, 2\] and head size 6; give an even size",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args", "told"), REFUSED)
def test_what_does_not_fit_together_is_refused(name: str, args: tuple[Any, ...], told: str) -> None:
    shared = name.removesuffix("8") if name.endswith(("modulate8", "layernorm8")) else name
    with pytest.raises(ValueError, match=f"{shared}: .*({told})"):
        getattr(echo_kernels, name)(*args)


def test_blocks_are_the_next_power_of_two() -> None:
    assert [block_of(n) for n in (0, 1, 2, 3, 1024, 1025)] == [1, 1, 2, 4, 1024, 2048]


def test_a_device_function_does_not_run_on_the_host() -> None:
    with pytest.raises(TypeError, match="runs on a device only; use launch"):
        Kernel(lambda: None)()


def test_a_compiler_traces_the_truth_through() -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def twice(x: Tensor) -> Tensor:
        return echo_kernels.rms_norm(x, torch.ones(12), 1e-6) * 2

    assert torch.equal(twice(X + 1), echo_kernels.rms_norm(X + 1, torch.ones(12), 1e-6) * 2)


def test_triton_stays_away_until_a_kernel_runs() -> None:
    code = (
        "import sys, torch, echo_kernels as e; e.rms_norm(torch.ones(2, 3), torch.ones(3), 0.0);"
        "assert 'triton' not in sys.modules; assert 'echo_ray' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, text=True)
    assert done.returncode == 0, done.stderr
