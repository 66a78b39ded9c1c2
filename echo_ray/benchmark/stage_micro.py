"""Pieces of a chunk on their own: device rates, matrix products, attention, kernels, the cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from echo_kernels import chunk_advance, place_memory
from echo_ray.benchmark.baseline_maths import Turns
from echo_ray.benchmark.ops import EIGHT_BITS, calls, drawn
from echo_ray.benchmark.result import Outcome, Table
from echo_ray.benchmark.rungs import Setting, attention, refusal
from echo_ray.benchmark.subject import Bench
from echo_ray.benchmark.work import key_counts
from echo_ray.model.backends import Machine
from echo_ray.model.rope import FrameRope

ATTENTIONS = ("flash", "cudnn", "fa2", "fa3", "plain")
FP8 = (8, 9)
"""Compute capability from which a device multiplies 8-bit floats."""
_BURST = 8192
_COPIED_BYTES = 2**30
_PLAIN_KEYS = 2**25
"""Products of queries and keys that plain attention is still tried on: it keeps all of them."""


def run(bench: Bench, out: Outcome) -> None:
    """All pieces, while the stage's time lasts."""
    parts = (_rates, _products, _attentions, _cache, _kernels)
    for part in parts:
        if why := bench.budget.refusal("micro", 1.0):
            out.skipped.append(f"{part.__name__.strip('_')}: {why}")
            continue
        bench.say(f"micro: {part.__name__.strip('_')}")
        part(bench, out)


def _time(bench: Bench, out: Outcome, name: str, work: Callable[[], object]) -> float:
    """Median milliseconds; the samples are kept under `name`."""
    work()
    samples = bench.timer.samples(work, bench.plan.repeats)
    out.samples[name] = samples
    return median(samples)


def _rates(bench: Bench, out: Outcome) -> None:
    size = 256 if bench.dry else _BURST
    count = 2**20 if bench.dry else _COPIED_BYTES
    table = out.table("Device rates", "what", "ms", "rate")
    source = torch.empty(count, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    ms = _time(bench, out, "copy", lambda: target.copy_(source))
    table.add(
        what=f"copy of {count / 2**20:.0f} MiB", ms=ms, rate=f"{2 * count / ms / 1e6:.0f} GB/s"
    )
    a, b = (_normal(bench, size, size) for _ in range(2))
    ms = _time(bench, out, "burst", lambda: a @ b)
    rate = f"{2 * size**3 / ms / 1e9:.0f} TFLOP/s"
    table.add(what=f"product {size} x {size}, {_short(bench.dtype)}", ms=ms, rate=rate)
    if why := _no_fp8(bench):
        out.skipped.append(f"burst of 8-bit floats: {why}")
        return
    ms = _time(bench, out, "burst fp8", _product8(a, b))
    rate = f"{2 * size**3 / ms / 1e9:.0f} TFLOP/s"
    table.add(what=f"product {size} x {size}, fp8, row-wise", ms=ms, rate=rate)


def _products(bench: Bench, out: Outcome) -> None:
    dit = bench.preset.dit
    rows = bench.preset.cache.frames_per_chunk * dit.tokens_per_frame
    shapes = {
        "q, k, v or o": (dit.dim, dit.dim),
        "q, k and v in one": (dit.dim, 3 * dit.dim),
        "feed-forward up": (dit.dim, dit.ffn_dim),
        "feed-forward down": (dit.ffn_dim, dit.dim),
        "head": (dit.dim, dit.out_channels * 4),
    }
    table = out.table("Matrix products", "what", "ms", "TFLOP/s", "fp8 ms", "fp8 TFLOP/s")
    no_fp8 = _no_fp8(bench)
    for name, (k, n) in shapes.items():
        x, w = _normal(bench, rows, k), _normal(bench, n, k)
        ms = _time(bench, out, f"product {name}", partial(torch.matmul, x, w.t()))
        row: dict[str, Any] = {"what": f"{name}: {rows} x {k} x {n}", "ms": ms}
        flops = 2 * rows * k * n
        row["TFLOP/s"] = flops / ms / 1e9
        if not no_fp8:
            row["fp8 ms"] = ms8 = _time(bench, out, f"product {name}, fp8", _product8(x, w.t()))
            row["fp8 TFLOP/s"] = flops / ms8 / 1e9
        table.add(row)


def _attentions(bench: Bench, out: Outcome) -> None:
    dit = bench.preset.dit
    queries = bench.preset.cache.frames_per_chunk * dit.tokens_per_frame
    table = out.table(f"Attention of {queries} queries", "library", "keys", "ms", "TFLOP/s")
    for name in ATTENTIONS:
        if why := refusal(bench, Setting(attention=name)):
            out.skipped.append(f"attention {name}: {why}")
            continue
        attend = attention(bench, name)
        for keys in key_counts(bench.preset):
            if name == "plain" and queries * keys > _PLAIN_KEYS:
                out.skipped.append(f"attention plain, {keys} keys: it would keep every product")
                continue
            q = _normal(bench, 1, queries, dit.num_heads, dit.head_dim)
            k, v = (_normal(bench, 1, keys, dit.num_heads, dit.head_dim) for _ in range(2))
            ms = _time(bench, out, f"attention {name}, {keys}", partial(attend, q, k, v))
            flops = 4 * queries * keys * dit.dim
            table.add(library=name, keys=keys, ms=ms, **{"TFLOP/s": flops / ms / 1e9})


def _cache(bench: Bench, out: Outcome) -> None:
    """What the baseline does to its keys in every layer-forward, and we once in a chunk."""
    dit, cache = bench.preset.dit, bench.preset.cache
    table = out.table("Keys of one layer", "what", "ms", "ms a chunk, all layers")
    tokens, sink, local = dit.tokens_per_frame, cache.sink_frames, cache.local_frames
    tail = (dit.num_heads, dit.head_dim)
    turns = Turns.of(bench.preset, bench.device)
    window = _normal(bench, 1, cache.window_frames * tokens, *tail)
    forwards = len(bench.preset.sampler.steps) + 1
    ms = _time(bench, out, "baseline turns a window", lambda: turns.turn(window, 0))
    table.add(
        what="baseline: rotate the window anew", ms=ms,
        **{"ms a chunk, all layers": ms * forwards * dit.num_layers},
    )  # fmt: skip
    raw, keys, values = (_normal(bench, 1, 1, local * tokens, *tail) for _ in range(3))
    rope = FrameRope(dit.grid_height, dit.grid_width, dit.head_dim, str(bench.device))
    count = cache.frames_per_chunk
    at = rope.table(range(sink, sink + local - count))
    ms = _time(
        bench, out, "chunk_advance",
        lambda: chunk_advance(raw, keys, values, at, count * tokens),
    )  # fmt: skip
    all_layers = ms * dit.num_layers
    table.add(what="ours: chunk_advance", ms=ms, **{"ms a chunk, all layers": all_layers})
    _memory(bench, out, table)


def _memory(bench: Bench, out: Outcome, table: Table) -> None:
    """The memory's machinery of one chunk: update, read-out, and the pair into every layer."""
    dit, cache, encoder = bench.preset.dit, bench.preset.cache, bench.modules.memory
    if encoder is None:
        return
    size = (1, cache.frames_per_chunk * dit.tokens_per_frame, dit.num_heads, dit.head_dim)
    gone_k, gone_v, query = _normal(bench, *size), _normal(bench, *size), encoder.initial(1)
    slots = (dit.num_layers, 1, cache.memory_frames * dit.tokens_per_frame, *size[2:])
    keys, values = (torch.empty(slots, dtype=bench.dtype, device=bench.device) for _ in range(2))
    rope = FrameRope(dit.grid_height, dit.grid_width, dit.head_dim, str(bench.device))
    at = rope.table(range(cache.memory_frames))

    def machinery() -> None:
        place_memory(*encoder.read_out(encoder.update(query, gone_k, gone_v)), at, keys, values)

    ms = _time(bench, out, "memory machinery", machinery)
    out.figures["memory_ms"] = ms
    table.add(what="ours: memory update, read-out, placing", **{"ms a chunk, all layers": ms})


def _kernels(bench: Bench, out: Outcome) -> None:
    """Every fused kernel beside its plain form: time, bytes, and error of either from float64."""
    table = out.table(
        "Kernels", "op", "plain ms", "kernel ms", "kernel GB/s", "plain error", "kernel error"
    )
    exact_calls, no_fp8 = calls(bench, torch.float64), _no_fp8(bench)
    for name, call in calls(bench, bench.dtype).items():
        exact = exact_calls[name].result(exact_calls[name].op.truth(*exact_calls[name].args))
        row: dict[str, Any] = {
            "op": name,
            "plain ms": _time(bench, out, f"{name}, plain", partial(call.op.truth, *call.args)),
            "plain error": _error(call.result(call.op.truth(*call.args)), exact),
        }
        if bench.device.type == "cuda" and name in EIGHT_BITS and no_fp8:
            out.skipped.append(f"kernel {name}: {no_fp8}")
        elif bench.device.type == "cuda":
            made = call.op.kernel(*call.args)
            error = _error(call.result(made), exact)
            ms = _time(bench, out, f"{name}, kernel", partial(call.op.kernel, *call.args))
            row |= {
                "kernel ms": ms, "kernel GB/s": call.size_bytes(made) / ms / 1e6,
                "kernel error": error,
            }  # fmt: skip
        table.add(row)
    if bench.device.type != "cuda":
        out.skipped.append("kernels: they need CUDA")


def _error(found: Tensor, exact: Tensor) -> float:
    gap = found.double() - exact.double()
    return float(gap.norm() / exact.double().norm().clamp_min(1e-30))


def _normal(bench: Bench, *size: int, salt: int = 0) -> Tensor:
    return drawn(bench, bench.dtype, salt, *size)


def _no_fp8(bench: Bench) -> str:
    machine = Machine.of(bench.device)
    if machine.kind != "cuda":
        return "needs CUDA"
    if machine.capability < FP8:
        return f"needs compute capability {FP8[0]}.{FP8[1]}, {machine.name} has less"
    return "" if bench.dtype is torch.bfloat16 else "its result is bfloat16, the model's is not"


def _product8(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
    """x [M, K] by w [K, N], both in e4m3 with a scale a row and a column, made beforehand."""
    x8, w8 = x.to(torch.float8_e4m3fn), w.t().contiguous().to(torch.float8_e4m3fn).t()
    scale_x = torch.ones(x.shape[0], 1, device=x.device)
    scale_w = torch.ones(1, w.shape[1], device=x.device)
    return lambda: torch._scaled_mm(
        x8, w8, scale_a=scale_x, scale_b=scale_w, out_dtype=torch.bfloat16
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
