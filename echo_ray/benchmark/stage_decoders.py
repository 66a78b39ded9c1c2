"""Decoders: time of a chunk's latents by form, and whether a replay of the last rebuilds the state.

The forms are a ladder of their own: the published layout and plain operations, the fused kernel,
channels last, and recorded as the engine does it. Each is compared with the first before it is
timed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from echo_ray.benchmark import gate
from echo_ray.benchmark.random_weights import random_codec
from echo_ray.benchmark.result import Check, Outcome, Table, Value
from echo_ray.benchmark.rungs import free, kernels_chosen, recorder_of
from echo_ray.benchmark.subject import Bench
from echo_ray.benchmark.timing import Spread
from echo_ray.engine.decoding import Decoders
from echo_ray.engine.lanes import lanes_of
from echo_ray.model.codec import Codec, CodecState
from echo_ray.preset import CodecShape, TinyVaeShape, WanVaeShape

_SMALL_WAN = {"dim": 4, "dim_mult": (1, 1, 1, 2)}
_DRY_SIDE = 2
PLAIN, KERNELS, LAST = "plain operations", "kernels", "channels last"
PAST = 2
"""Latents before the chunk that is timed: the first is another forward than all others."""
_SHORT = 9
"""Latents that a window keeps: fewer than the large decoder needs."""


def run(bench: Bench, out: Outcome) -> None:
    """Every codec that the preset names; for one with neither, both at a small size."""
    times = out.table(
        "Decoders", "decoder", "form", "ms a chunk", "p95 ms", "times the first", "state MB"
    )
    replays = out.table(
        "Rebuilding a decoder", "decoder", "latents", "ms", "state", "frames off by"
    )
    for name, shape in codecs(bench).items():
        if why := bench.budget.refusal("decoders", 1.0):
            out.skipped.append(f"{name}: {why}")
            continue
        bench.say(f"decoders: {name}")
        codec = random_codec(shape, bench.preset.dit, bench.device, bench.dtype, bench.seed)
        _ladder(bench, out, name, codec, times)
        _rebuilt(bench, out, name, codec, replays)
        del codec
        free(bench)


def _ladder(bench: Bench, out: Outcome, name: str, codec: Codec, times: Table) -> None:
    """Every form in its turn; one that decodes otherwise than the first is not timed."""
    stream = _latents(bench, PAST + bench.preset.cache.frames_per_chunk)
    with kernels_chosen(kernels=False):
        first = codec.decode(stream, codec.initial_state())[0]
        _timed(bench, out, name, PLAIN, codec, times)
    if bench.dry:
        out.skipped.append(f"{name}, {KERNELS}: needs CUDA")
    elif _same(bench, out, name, KERNELS, codec.decode(stream, codec.initial_state())[0], first):
        _timed(bench, out, name, KERNELS, codec, times)
    codec.lie_channels_last()
    last = codec.decode(stream, codec.initial_state())[0]
    if _same(bench, out, name, LAST, last, first):
        _timed(bench, out, name, LAST, codec, times)
    _recorded(bench, out, name, codec, last, times)


def _same(bench: Bench, out: Outcome, name: str, form: str, found: Tensor, first: Tensor) -> bool:
    """Whether frames are those of the first form but for rounding."""
    # Frames are float32 in every model: its own kind tells how much they may be off.
    share = gate.SHARE if bench.dtype is torch.bfloat16 else gate.RTOL
    result = gate.compared("frames", 0, found, first, share)
    detail = f"frames off by {result.found:.1e} of their size, {result.allowed:.0e} allowed"
    out.checks.append(Check(f"{name} decoder, {form}", result.passed, detail))
    return result.passed


def _timed(bench: Bench, out: Outcome, name: str, form: str, codec: Codec, times: Table) -> None:
    """A chunk's latents in the middle of a stream."""
    past, last = _latents(bench, PAST), _latents(bench, bench.preset.cache.frames_per_chunk)
    live = codec.decode(past, codec.initial_state())[1]
    codec.decode(last, live)
    samples = bench.timer.samples(lambda: codec.decode(last, live), bench.plan.decoded_chunks)
    _tell(out, name, form, samples, sum(t.nbytes for t in live.values()), times)


def _recorded(
    bench: Bench, out: Outcome, name: str, codec: Codec, expected: Tensor, times: Table
) -> None:
    """As the engine decodes: in a lane of its own, each latent a replay over a place that stays."""
    recorder, lanes = recorder_of(bench), lanes_of(bench.device)
    decoders = Decoders(codec, lanes, recorder)
    stream = _latents(bench, PAST + bench.preset.cache.frames_per_chunk)
    form = "recorded, its discipline checked" if bench.dry else "graph"
    with lanes.decoding(lanes.mark(), [stream]):
        decoder = decoders.start()
        found = decoders.decode(decoder, stream)
        same = torch.equal(found, expected)
        said = "the same bits" if same else "other bits"
        out.checks.append(Check(f"{name} decoder, {form}", same, f"{said} as without"))
        last = stream[:, PAST:]
        samples = bench.timer.samples(
            lambda: decoders.decode(decoder, last), bench.plan.decoded_chunks
        )
    size = decoders.size_bytes
    decoders.close(decoder)
    if recorder.failures:
        out.skipped.append(f"{name}, {form}: could not be captured")
        return
    if same:
        _tell(out, name, form, samples, size, times)


def _tell(
    out: Outcome, name: str, form: str, samples: list[float], size: int, times: Table
) -> None:
    """The latest form, which is the one that is served, is the decoder's figure."""
    spread = Spread.of(samples)
    out.samples[f"decoder {name}, {form}"] = samples
    out.figures[f"decode_{name}_ms"] = spread.median
    whole = out.figures.setdefault(f"decode_{name}_plain_ms", spread.median)
    times.add(
        {"decoder": name, "form": form, "ms a chunk": spread.median, "p95 ms": spread.p95,
         "times the first": whole / spread.median, "state MB": size / 1e6}
    )  # fmt: skip


def _rebuilt(bench: Bench, out: Outcome, name: str, codec: Codec, replays: Table) -> None:
    """The state after many latents, against what the last few of them make."""
    count = bench.preset.cache.frames_per_chunk
    latents = _latents(bench, codec.rebuild_latents + 2 * count)
    past, last = latents[:, :-count], latents[:, -count:]
    live = codec.decode(past, codec.initial_state())[1]
    for kept in sorted({_SHORT, codec.rebuild_latents}):
        row, check = _replayed(bench, codec, name, past[:, -kept:], live, last)
        replays.add(row)
        if kept >= codec.rebuild_latents:
            out.checks.append(check)


def codecs(bench: Bench) -> dict[str, CodecShape]:
    found: dict[str, CodecShape] = {}
    for shape in (bench.preset.codec, bench.preset.small_codec):
        if isinstance(shape, WanVaeShape | TinyVaeShape):
            found[shape.kind] = shape
    if found:
        return found
    zeros, ones = ((v,) * bench.preset.dit.in_channels for v in (0.0, 1.0))
    wan = WanVaeShape(mean=zeros, std=ones, **_SMALL_WAN)  # type: ignore[arg-type]
    return {"wan": wan, "tiny": TinyVaeShape(encoder_width=4, decoder_widths=(8, 8, 4, 4))}


def _replayed(
    bench: Bench,
    codec: Codec,
    name: str,
    kept: Tensor,
    live: CodecState,
    last: Tensor,
) -> tuple[dict[str, Value], Check]:
    """The state rebuilt from the latest latents, compared with the live one."""
    count = kept.shape[1]
    made: list[CodecState] = []
    ms = bench.timer.once(lambda: made.append(codec.rebuild(kept, first=False)))
    state = made[0]
    equal = state.keys() == live.keys() and all(torch.equal(state[k], live[k]) for k in live)
    expected, found = codec.decode(last, live)[0], codec.decode(last, state)[0]
    off = float((found - expected).norm() / expected.norm())
    row: dict[str, Value] = {
        "decoder": name, "latents": count, "ms": ms,
        "state": "the same bits" if equal else "other bits", "frames off by": off,
    }  # fmt: skip
    what = f"{name} decoder is rebuilt from {count} latents"
    return row, Check(what, equal, f"frames differ by {off:.2e} of their size")


def _latents(bench: Bench, count: int) -> Tensor:
    """Of the preset's size; on a CPU of a few pixels."""
    dit = bench.preset.dit
    height, width = (_DRY_SIDE,) * 2 if bench.dry else (dit.latent_height, dit.latent_width)
    generator = torch.Generator(bench.device).manual_seed(bench.seed)
    size = (1, count, dit.in_channels, height, width)
    return torch.randn(size, generator=generator, device=bench.device).to(bench.dtype)
