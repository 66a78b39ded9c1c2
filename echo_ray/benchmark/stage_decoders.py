"""Decoders: time of a chunk's latents, and whether a replay of the last ones rebuilds the state."""

from __future__ import annotations

import torch
from torch import Tensor

from echo_ray.benchmark.random_weights import random_codec
from echo_ray.benchmark.result import Check, Outcome, Table, Value
from echo_ray.benchmark.rungs import free, kernels_chosen, recorder_of
from echo_ray.benchmark.subject import Bench
from echo_ray.benchmark.timing import Spread
from echo_ray.model.codec import Codec, CodecState
from echo_ray.preset import CodecShape, TinyVaeShape, WanVaeShape

_SMALL_WAN = {"dim": 4, "dim_mult": (1, 1, 1, 2)}
_DRY_SIDE = 2
_SHORT = 9
"""Latents that a window keeps: fewer than the large decoder needs."""


def run(bench: Bench, out: Outcome) -> None:
    """Every codec that the preset names; for one with neither, both at a small size."""
    times = out.table("Decoders", "decoder", "form", "ms a chunk", "p95 ms", "state MB")
    replays = out.table(
        "Rebuilding a decoder", "decoder", "latents", "ms", "state", "frames off by"
    )
    for name, shape in codecs(bench).items():
        if why := bench.budget.refusal("decoders", 1.0):
            out.skipped.append(f"{name}: {why}")
            continue
        bench.say(f"decoders: {name}")
        codec = random_codec(shape, bench.preset.dit, bench.device, bench.dtype, bench.seed)
        with kernels_chosen(kernels=False):
            _timed(bench, out, name, "plain operations", codec, times)
        if not bench.dry:
            _timed(bench, out, name, "kernels", codec, times)
        codec.lie_channels_last()
        _timed(bench, out, name, "channels last", codec, times)
        _recorded(bench, out, name, codec, times)
        _rebuilt(bench, out, name, codec, replays)
        del codec
        free(bench)


def _timed(bench: Bench, out: Outcome, name: str, form: str, codec: Codec, times: Table) -> None:
    """A chunk's latents in the middle of a stream."""
    past, last = _latents(bench, 2), _latents(bench, bench.preset.cache.frames_per_chunk)
    live = codec.decode(past, codec.initial_state())[1]
    codec.decode(last, live)
    samples = bench.timer.samples(lambda: codec.decode(last, live), bench.plan.decoded_chunks)
    _tell(out, name, form, samples, live, times)


def _recorded(bench: Bench, out: Outcome, name: str, codec: Codec, times: Table) -> None:
    """The same, each latent a replay of one recording over a state that stays where it is."""
    stream = _latents(bench, 2 + bench.preset.cache.frames_per_chunk)
    latent = stream[:, 0].clone()
    state, recorder = codec.fixed_state(latent), recorder_of(bench)

    def work() -> Tensor:
        return codec.decode_fixed(latent, state, first=False)

    # Recording runs the work, on a GPU twice: the stream begins after it, in the same place.
    recording = recorder.record(work)[1]
    for past in state.values():
        past.zero_()
    codec.decode_fixed(latent, state, first=True)
    expected, found = codec.decode(stream, codec.initial_state())[0], []
    for each in stream.unbind(1)[1:]:
        latent.copy_(each)
        frames = recording.replay(work)
        assert frames is not None
        found.append(frames.clone())
    same = torch.equal(torch.cat(found, dim=1), expected[:, 1:])
    form = "recorded, its discipline checked" if bench.dry else "graph"
    said = "the same bits" if same else "other bits"
    out.checks.append(Check(f"{name} decoder, {form}", same, f"{said} as latent by latent"))

    def chunk() -> None:
        for each in stream.unbind(1)[2:]:
            latent.copy_(each)
            recording.replay(work)

    samples = bench.timer.samples(chunk, bench.plan.decoded_chunks)
    if recorder.failures:
        out.skipped.append(f"{name}, {form}: could not be captured")
        return
    _tell(out, name, form, samples, state, times)


def _tell(
    out: Outcome, name: str, form: str, samples: list[float], state: CodecState, times: Table
) -> None:
    """The quickest form is the decoder's figure."""
    spread = Spread.of(samples)
    out.samples[f"decoder {name}, {form}"] = samples
    key = f"decode_{name}_ms"
    out.figures[key] = min(spread.median, out.figures.get(key, spread.median))
    size = sum(t.numel() * t.element_size() for t in state.values()) / 1e6
    times.add(
        {"decoder": name, "form": form, "ms a chunk": spread.median, "p95 ms": spread.p95,
         "state MB": size}
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
