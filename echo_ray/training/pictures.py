"""Contact sheets: rows of small frames in one PNG."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor


def contact_sheet(rows_RNCHW: Tensor, file: Path, scale: int = 2) -> None:
    """Write one row of frames per entry; frames are in [0, 1]."""
    rows, count, _, height, width = rows_RNCHW.shape
    pixels = rows_RNCHW.detach().float().clamp(0, 1).mul(255).round().byte()
    sheet = pixels.permute(0, 3, 1, 4, 2).reshape(rows * height, count * width, 3)
    image = Image.fromarray(sheet.contiguous().numpy())
    file.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(file)
