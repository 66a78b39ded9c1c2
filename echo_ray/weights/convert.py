"""A plan carried out: one safetensors folder with its manifest, or nothing at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from echo_ray.errors import WeightsError
from echo_ray.model.tokens import FILE_NAME as TOKENIZER_FILE
from echo_ray.weights.manifest import FILE as MANIFEST_FILE
from echo_ray.weights.manifest import (
    FileRecord,
    Manifest,
    Source,
    file_record,
    progress,
    read_manifest,
    write_manifest,
)
from echo_ray.weights.plan import Plan
from echo_ray.weights.wording import in_units
from echo_ray.weights.writer import file_bytes, write_file

PARTIAL = ".partial-"
_TOKENIZER = f"tokenizer/{TOKENIZER_FILE}"


def convert(plan: Plan, dst: Path, *, overwrite: bool = False) -> Manifest:
    """Write the weights folder `dst`; on any failure it stays as it was.

    Raises `WeightsError`: the target is taken, the disk is too full, a value is not finite.
    """
    check_target(dst, overwrite=overwrite)
    check_space(plan, dst)
    try:
        with _stage(dst) as stage:
            manifest = _fill(plan, stage)
            _publish(stage, dst, manifest)
    except OSError as e:
        raise WeightsError(f"{e.filename or dst}: conversion failed: {e.strerror or e}") from e
    return manifest


def check_target(dst: Path, *, overwrite: bool) -> None:
    """Raise `WeightsError` unless `dst` may become a weights folder."""
    if not dst.exists():
        return
    if not dst.is_dir():
        raise WeightsError(f"{dst}: is a file; name a folder")
    held = [path.name for path in dst.iterdir()]
    rest = [name for name in held if not name.startswith(PARTIAL)]
    if rest and MANIFEST_FILE not in rest:
        raise WeightsError(
            f"{dst}: is not empty, and not a weights folder either; name another one"
        )
    if held and not overwrite:
        what = "is a weights folder already" if rest else "holds an unfinished conversion"
        raise WeightsError(f"{dst}: {what}; --overwrite replaces it")


def check_space(plan: Plan, dst: Path) -> None:
    """Raise `WeightsError` unless the disk has room for all files at once."""
    needed = plan_bytes(plan)
    place = next(p for p in (dst, *dst.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise WeightsError(
            f"{dst}: the disk is too full: {in_units(needed)} are needed and {in_units(free)} "
            "are free; make room, or name a folder on another disk"
        )


def plan_bytes(plan: Plan) -> int:
    """How much the plan will write."""
    parts = sum(file_bytes(entries) for entries in plan.parts.values())
    return parts + (plan.tokenizer / TOKENIZER_FILE).stat().st_size


@contextmanager
def _stage(dst: Path) -> Iterator[Path]:
    """A folder inside `dst` that is gone afterwards, as is `dst` if nothing came of it."""
    created = not dst.exists()
    dst.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=dst))
    try:
        yield stage
    finally:
        shutil.rmtree(stage)
        if created and not any(dst.iterdir()):
            dst.rmdir()


def _fill(plan: Plan, stage: Path) -> Manifest:
    """Write every file and read every source, with one bar over all their bytes."""
    files: dict[str, FileRecord] = {}
    sources = {origin.file: origin.file.stat().st_size for origin in plan.origins}
    total = plan_bytes(plan) + sum(sources.values())
    with progress(total, "converting") as bar:
        for part, entries in plan.parts.items():
            bar.set_postfix_str(part)
            files[f"{part}.safetensors"] = write_file(
                stage / f"{part}.safetensors", entries, bar.update
            )
        (stage / _TOKENIZER).parent.mkdir()
        shutil.copyfile(plan.tokenizer / TOKENIZER_FILE, stage / _TOKENIZER)
        files[_TOKENIZER] = file_record(stage / _TOKENIZER, bar.update)
        bar.set_postfix_str("hashes of the sources")
        read = _origin_records(list(sources), bar.update)
    rows = [
        Source(o.part, o.file.name, read[o.file].bytes, read[o.file].sha256, o.note)
        for o in plan.origins
    ]
    return write_manifest(stage, plan.preset, files, rows)


def _origin_records(files: list[Path], read: Callable[[int], object]) -> dict[Path, FileRecord]:
    return {file: file_record(file, read) for file in files}


def _publish(stage: Path, dst: Path, manifest: Manifest) -> None:
    """Move the files to their place, the manifest last: without it the folder is none."""
    old = _old_files(dst)
    (dst / MANIFEST_FILE).unlink(missing_ok=True)
    for name in old:
        (dst / name).unlink(missing_ok=True)
    for path in dst.glob(f"{PARTIAL}*"):
        if path != stage:
            shutil.rmtree(path)
    for name in (*manifest.files, MANIFEST_FILE):
        (dst / name).parent.mkdir(exist_ok=True)
        (stage / name).replace(dst / name)


def _old_files(dst: Path) -> list[str]:
    try:
        return list(read_manifest(dst).files)
    except WeightsError:
        return []
