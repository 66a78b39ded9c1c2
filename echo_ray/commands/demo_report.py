"""What the demo ends with: the comparison with an undisturbed run, a table, a clip, a sheet."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from echo_ray.commands.demo import BUFFER_S, CHUNKS, PROMPTS, SEED, SWITCHED, Viewing

if TYPE_CHECKING:
    from echo_ray.session.chunk import Chunk
    from echo_ray.session.engine_port import StreamShape


@dataclass(frozen=True, slots=True)
class Findings:
    """One viewer's stream, measured."""

    frames: int
    fps: float
    usual_gap_s: float
    largest_gap_s: float
    stall_s: float
    lost: int
    duplicated: int
    differing: int
    owners: int


def report(viewings: list[Viewing], out: Path) -> int:
    """Print the table, write the files; 1 if a promise broke."""
    from tqdm import tqdm

    from echo_ray.config import ModelSection
    from echo_ray.engine.build import build_engine
    from echo_ray.engine.clip import contact_sheet, write_clip

    engine = build_engine(ModelSection())
    findings = {}
    for number, viewing in enumerate(viewings):
        state = engine.open(PROMPTS[viewing.name], SEED + number)
        chunks = [
            engine.step(state, [SWITCHED] if index == viewing.switched_at else [])
            for index in tqdm(
                range(CHUNKS), desc=f"undisturbed run of {viewing.name}", unit="chunk"
            )
        ]
        findings[viewing.name] = examine(viewing, chunks, engine.shape)
        seen = received(viewing, engine.shape)
        write_clip(out / f"{viewing.name}.mp4", seen, engine.shape.fps)
        (out / f"{viewing.name}.png").write_bytes(contact_sheet(seen, columns=9))
    print(table(viewings, findings))
    print(f"clips and contact sheets: {out}/")
    broken = complaints(viewings, findings)
    for complaint in broken:
        print(f"BROKEN: {complaint}")
    return 1 if broken else 0


def received(viewing: Viewing, shape: StreamShape) -> list[Chunk]:
    """The viewer's own segments, for the clip: not the undisturbed run's."""
    from echo_ray.session.chunk import Chunk, DriftReading

    rows = zip(viewing.indices, viewing.frames, viewing.digests, viewing.prompts, strict=True)
    return [
        Chunk(
            index=index,
            frames=frames,
            num_frames=shape.frames_in(index),
            height=shape.height,
            width=shape.width,
            digest=digest,
            drift=DriftReading(0.0),
            prompt=prompt,
        )
        for index, frames, digest, prompt in rows
    ]


def examine(viewing: Viewing, truth: list[Chunk], shape: StreamShape) -> Findings:
    """Compare what a viewer received with the undisturbed run, and time it."""
    seen = viewing.indices
    expected = {chunk.index: chunk.digest for chunk in truth}
    differing = sum(
        expected.get(i) != d for i, d in zip(seen, viewing.digests, strict=True) if i in expected
    )
    gaps = [b - a for a, b in pairwise(viewing.arrivals)]
    frames = sum(shape.frames_in(i) for i in seen)
    return Findings(
        frames=frames,
        fps=frames / max(viewing.arrivals[-1] - viewing.arrivals[0], 1e-9),
        usual_gap_s=median(gaps),
        largest_gap_s=max(gaps),
        stall_s=stall_seconds(viewing, shape),
        lost=len(set(expected) - set(seen)),
        duplicated=len(seen) - len(set(seen)) + sum(a > b for a, b in pairwise(seen)),
        differing=differing,
        owners=len(set(viewing.owners)),
    )


def stall_seconds(viewing: Viewing, shape: StreamShape) -> float:
    """How long playout stood still in all, had it begun `BUFFER_S` after the first segment."""
    begin, stalled = viewing.arrivals[0] + BUFFER_S, 0.0
    for index, arrival in zip(viewing.indices, viewing.arrivals, strict=True):
        stalled += max(0.0, arrival - (begin + stalled + shape.start_s(index)))
    return stalled


def complaints(viewings: list[Viewing], findings: dict[str, Findings]) -> list[str]:
    broken = []
    for viewing in viewings:
        f = findings[viewing.name]
        if f.lost or f.duplicated or f.differing:
            broken.append(f"{viewing.name}: {f.lost}/{f.duplicated}/{f.differing} segments")
    first = viewings[0]
    if first.switched_at is None:
        broken.append("the prompt switch was never acknowledged")
    if first.killed_at is None or findings[first.name].owners < 2:
        broken.append("the stream was not carried on by another replica")
    if not all(v.snapshot_bytes for v in viewings):
        broken.append("a session has no snapshot")
    return broken


def table(viewings: list[Viewing], findings: dict[str, Findings]) -> str:
    rows = [["", *(v.name for v in viewings)]]

    def row(label: str, values: list[str]) -> None:
        rows.append([label, *values])

    each = [findings[v.name] for v in viewings]
    row("frames", [str(f.frames) for f in each])
    row("frames per second", [f"{f.fps:.1f}" for f in each])
    row("usual gap between segments", [f"{f.usual_gap_s:.2f} s" for f in each])
    row("largest gap seen by the viewer", [f"{f.largest_gap_s:.2f} s" for f in each])
    row(f"stall with a {BUFFER_S:.0f} s buffer", [f"{f.stall_s:.2f} s" for f in each])
    row("owners", [str(f.owners) for f in each])
    row(
        "segments lost/duplicated/differing",
        [f"{f.lost}/{f.duplicated}/{f.differing}" for f in each],
    )
    row("snapshot", [f"{v.snapshot_bytes} bytes" for v in viewings])
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows
    )
