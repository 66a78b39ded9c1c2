"""Pictures of a training: contact sheets of small frames, and curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

Points = Sequence[tuple[int, float]]
INKS = ("#1f5fbf", "#c2410c", "#15803d", "#7e22ce")
WIDTH, PANEL, MARGIN = 720, 220, 56


def contact_sheet(rows_RNCHW: Tensor, file: Path, scale: int = 2) -> None:
    """Write one row of frames per entry; frames are in [0, 1]."""
    rows, count, _, height, width = rows_RNCHW.shape
    pixels = rows_RNCHW.detach().float().clamp(0, 1).mul(255).round().byte()
    sheet = pixels.permute(0, 3, 1, 4, 2).reshape(rows * height, count * width, 3)
    image = Image.fromarray(sheet.contiguous().cpu().numpy())
    file.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(file)


def curve_picture(curves: Mapping[str, Points], file: Path) -> None:
    """One panel per curve over the steps, the loss on a logarithmic axis."""
    drawn = {name: points for name, points in curves.items() if len(points) > 1}
    image = Image.new("RGB", (WIDTH, max(1, PANEL * len(drawn))), "white")
    canvas = ImageDraw.Draw(image)
    for n, (name, points) in enumerate(drawn.items()):
        _panel(canvas, name, points, PANEL * n, INKS[n % len(INKS)])
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def _panel(canvas: ImageDraw.ImageDraw, name: str, points: Points, top: int, ink: str) -> None:
    steps = [step for step, _ in points]
    heights = [math.log10(max(loss, 1e-9)) for _, loss in points]
    low, high = min(heights), max(heights)
    first, last = min(steps), max(steps)
    left, right = MARGIN, WIDTH - 12
    bottom, upper = top + PANEL - 24, top + 24
    canvas.rectangle((left, upper, right, bottom), outline="#999999")
    line = [
        (
            left + (right - left) * (step - first) / max(1, last - first),
            bottom - (bottom - upper) * (height - low) / max(1e-9, high - low),
        )
        for step, height in zip(steps, heights, strict=True)
    ]
    canvas.line(line, fill=ink, width=2)
    canvas.text((left, top + 6), name, fill=ink)
    canvas.text((4, upper), f"{10**high:.4g}", fill="black")
    canvas.text((4, bottom - 12), f"{10**low:.4g}", fill="black")
    canvas.text((left, bottom + 4), str(first), fill="black")
    canvas.text((right - 48, bottom + 4), str(last), fill="black")
