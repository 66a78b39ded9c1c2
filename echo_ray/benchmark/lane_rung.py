"""The ladder's last exact switch: a chunk is decoded behind its forwards, or beside their last.

Chunks here are whole, frames on the host included, and the host waits for each of them as it does
when they are served.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from statistics import median

import torch
from torch import Tensor

from echo_kernels import frames_to_uint8
from echo_ray.benchmark.gate import FIRST_MATURE
from echo_ray.benchmark.random_weights import random_codec
from echo_ray.benchmark.result import Check, Outcome, Table
from echo_ray.benchmark.rungs import best_seen, climbed, free, recorder_of
from echo_ray.benchmark.subject import Bench
from echo_ray.engine.decoding import Decoders
from echo_ray.engine.generator import Generator
from echo_ray.engine.lanes import lanes_of
from echo_ray.weights.modules import lay_out

BEHIND, BESIDE = "behind the chunk's forwards", "in a lane of its own"
Whole = Callable[[], Tensor]


def run(bench: Bench, out: Outcome) -> None:
    """Both forms in turns, with each of the preset's decoders; the forwards have every switch."""
    table = out.table("Whole chunks", "decoder", "decoded", "ms", "times the first")
    rung = best_seen(bench)
    if bench.dry:
        out.skipped.append(f"decoded {BESIDE}: needs CUDA, a CPU has one lane")
    for shape in dict.fromkeys((bench.preset.small_codec, bench.preset.codec)):
        if shape is None:
            continue
        if why := bench.budget.refusal("ladder", _needed_s(bench, out)):
            out.skipped.append(f"whole chunks, {shape.kind}: {why}")
            continue
        bench.say(f"ladder: whole chunks, {shape.kind}")
        codec = random_codec(shape, bench.preset.dit, bench.device, bench.dtype, bench.seed)
        lay_out(codec, bench.device)
        recorder = None if bench.dry else recorder_of(bench)
        decoders = Decoders(codec, lanes_of(bench.device), recorder)
        with climbed(bench, rung) as generator:
            _in_turns(bench, out, table, shape.kind, generator, decoders)
        del codec, decoders, recorder
        free(bench)


def _needed_s(bench: Bench, out: Outcome) -> float:
    """By the forwards alone; decoding may take half as long again."""
    chunks = 2 * (_warm(bench) + bench.plan.blocks * bench.plan.chunks)
    return 1.5 * chunks * out.figures.get("chunk_ms", 0.0) / 1000


def _warm(bench: Bench) -> int:
    return 1 if bench.dry else FIRST_MATURE + 1


def _in_turns(
    bench: Bench,
    out: Outcome,
    table: Table,
    kind: str,
    generator: Generator,
    decoders: Decoders,
) -> None:
    forms = {form: _chunks(bench, generator, decoders, form == BESIDE) for form in (BEHIND, BESIDE)}
    for _ in range(_warm(bench)):
        behind, beside = (chunk() for chunk in forms.values())
    same = torch.equal(behind, beside)
    said = f"{'the same' if same else 'other'} frames as {BEHIND}"
    out.checks.append(Check(f"{kind} decoder, {BESIDE}", same, said))
    times: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(bench.plan.blocks):
        for form, chunk in forms.items():
            ms = bench.timer.once(lambda: [chunk() for _ in range(bench.plan.chunks)])  # noqa: B023
            times[form].append(ms / bench.plan.chunks)
    first = median(times[BEHIND])
    for form, samples in times.items():
        out.samples[f"whole chunk, {kind}, decoded {form}"] = samples
        ms = median(samples)
        table.add({"decoder": kind, "decoded": form, "ms": ms, "times the first": first / ms})
    # The second is what is served.
    out.figures[f"whole_{kind}_ms"] = median(times[BESIDE])


def _chunks(bench: Bench, generator: Generator, decoders: Decoders, beside: bool) -> Whole:
    """Makes a stream's next chunk, from noise to frames [N, H, W, 3] on the host."""
    lanes, noise = lanes_of(bench.device), bench.noise()
    state, decoder = generator.start(bench.prompts()[0]), decoders.start()

    def chunk() -> Tensor:
        clean = generator.denoise(state, noise)
        made = lanes.mark()
        generator.absorb(state, clean)
        with lanes.decoding(made, [clean]) if beside else nullcontext():
            copy = lanes.fetch([frames_to_uint8(decoders.decode(decoder, clean)[0])])
        return copy.wait()[0]

    return chunk
