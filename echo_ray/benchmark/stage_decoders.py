"""Decoders: time of a chunk's latents, and whether a replay of the last ones rebuilds the state."""

from __future__ import annotations

from statistics import median

import torch
from torch import Tensor

from echo_ray.benchmark.random_weights import random_codec
from echo_ray.benchmark.result import Check, Outcome, Table, Value
from echo_ray.benchmark.subject import Bench
from echo_ray.benchmark.timing import Spread
from echo_ray.model.codec import Codec, CodecState
from echo_ray.preset import CodecShape, TinyVaeShape, WanVaeShape

_SMALL_WAN = {"dim": 4, "dim_mult": (1, 1, 1, 2)}
_SHORT = 9
"""Latents that a window keeps: fewer than the large decoder needs."""


def run(bench: Bench, out: Outcome) -> None:
    """Every codec that the preset names; for one with neither, both at a small size."""
    times = out.table("Decoders", "decoder", "ms a chunk", "p95 ms", "state MB")
    replays = out.table(
        "Rebuilding a decoder", "decoder", "latents", "ms", "state", "frames off by"
    )
    for name, shape in codecs(bench).items():
        if why := bench.budget.refusal("decoders", 1.0):
            out.skipped.append(f"{name}: {why}")
            continue
        bench.say(f"decoders: {name}")
        codec = random_codec(shape, bench.preset.dit, bench.device, bench.dtype, bench.seed)
        _measured(bench, out, name, codec, times, replays)


def _measured(
    bench: Bench, out: Outcome, name: str, codec: Codec, times: Table, replays: Table
) -> None:
    count = bench.preset.cache.frames_per_chunk
    latents = _latents(bench, codec.rebuild_latents + 2 * count)
    past, last = latents[:, :-count], latents[:, -count:]
    live = codec.decode(past, codec.initial_state())[1]
    samples = bench.timer.samples(lambda: codec.decode(last, live), bench.plan.decoded_chunks)
    out.samples[f"decoder {name}"] = samples
    out.figures[f"decode_{name}_ms"] = median(samples)
    times.add({
            "decoder": name, "ms a chunk": median(samples), "p95 ms": Spread.of(samples).p95,
            "state MB": sum(t.numel() * t.element_size() for t in live.values()) / 1e6,
        }
    )  # fmt: skip
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
    dit = bench.preset.dit
    generator = torch.Generator(bench.device).manual_seed(bench.seed)
    size = (1, count, dit.in_channels, dit.latent_height, dit.latent_width)
    drawn = torch.randn(size, generator=generator, device=bench.device)
    return drawn.to(bench.dtype)
