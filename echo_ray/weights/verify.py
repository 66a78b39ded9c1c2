"""Checks a weights folder, or a folder of published files, without writing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from echo_ray.errors import ConfigError, EchoError, WeightsError
from echo_ray.model.tokens import FILE_NAME as TOKENIZER_FILE
from echo_ray.model.tokens import PromptTokenizer
from echo_ray.preset import Preset, UMT5Shape
from echo_ray.weights.convert import plan_bytes
from echo_ray.weights.folder import WeightsFolder
from echo_ray.weights.layout import expected, problems
from echo_ray.weights.manifest import FILE as MANIFEST_FILE
from echo_ray.weights.manifest import progress
from echo_ray.weights.plan import Plan, make_plan
from echo_ray.weights.sources import Options
from echo_ray.weights.wording import in_units
from echo_ray.weights.writer import Entry, finite_blocks

OPTIONAL = "small_codec"
"""A converted folder may go without it."""


@dataclass(slots=True)
class Report:
    """What was found: a line for each thing that is right, and every reason why it is not."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(path: Path, preset: Preset, options: Options | None = None) -> Report:
    """Check that a folder holds the whole preset: a converted one, or published files."""
    if (path / MANIFEST_FILE).exists():
        return verify_folder(path, preset)
    return verify_published(path, preset, options)


def verify_published(path: Path, preset: Preset, options: Options | None = None) -> Report:
    """The same checks as a conversion makes, down to every value."""
    report = Report()
    try:
        plan = make_plan(path, preset, options)
        _check_values(plan, report)
    except WeightsError as e:
        report.problems += e.message.split("\n  ")
        return report
    report.lines += plan.notes
    if report.ok:
        report.lines.append(
            f"these files convert: {preset.name}, {in_units(plan_bytes(plan))}; "
            f"echo-ray weights convert {path} DST"
        )
    return report


def _check_values(plan: Plan, report: Report) -> None:
    with progress(plan_bytes(plan), "checking") as bar:
        for part, entries in plan.parts.items():
            report.problems += _not_finite(entries, bar.update)
            report.lines.append(_described(part, entries))


def verify_folder(path: Path, preset: Preset) -> Report:
    """Sizes, hashes, keys, shapes, values and tokenizer of a converted folder."""
    report = Report()
    try:
        folder = WeightsFolder.open(path)
    except WeightsError as e:
        report.problems.append(e.message)
        return report
    for check in _checks(folder, preset):
        try:
            check()
        except EchoError as e:
            report.problems.append(e.message)
    if not report.problems:
        report.lines.append(f"{len(folder.manifest.files)} files as the manifest says")
    wanted = expected(preset)
    report.problems += [
        f"{part}: belongs to no part of {preset.name}" for part in folder.index.keys() - wanted
    ]
    damaged = bool(report.problems)
    for part, shapes in wanted.items():
        if not folder.has(part):
            said = f"{part}: not in this folder"
            (report.lines if part == OPTIONAL else report.problems).append(said)
            continue
        wrong = problems(preset, part, shapes, folder.shapes(part))
        report.problems += wrong
        if not wrong and not damaged:
            entries = [_entry(part, key, value) for key, value in folder.part(part).items()]
            report.problems += _not_finite(entries)
            report.lines.append(_described(part, entries))
    if report.ok:
        report.lines.append(f"whole: {preset.name}, digest {folder.digest}")
    return report


def _checks(folder: WeightsFolder, preset: Preset) -> Iterator[Callable[[], object]]:
    yield lambda: folder.check(preset)
    for name in folder.manifest.files:
        yield partial(folder.check_file, name)
    yield lambda: _check_tokenizer(folder, preset)


def _check_tokenizer(folder: WeightsFolder, preset: Preset) -> None:
    if not isinstance(preset.text, UMT5Shape):
        return
    PromptTokenizer.from_folder(folder.tokenizer, preset.dit.text_len, preset.text.vocab)
    if f"tokenizer/{TOKENIZER_FILE}" not in folder.manifest.files:
        raise ConfigError(f"{folder.tokenizer}: its {TOKENIZER_FILE} is not in the manifest")


def _entry(part: str, key: str, value: Tensor) -> Entry:
    return Entry(f"{part}.{key}", value.dtype, tuple(value.shape), lambda: value)


def _not_finite(
    entries: list[Entry], read: Callable[[int], object] = lambda _: None
) -> Iterator[str]:
    for entry in entries:
        try:
            _read_through(entry, read)
        except WeightsError as e:
            yield e.message


def _read_through(entry: Entry, read: Callable[[int], object]) -> None:
    for block in finite_blocks(entry):
        read(block.nbytes)


def _described(part: str, entries: list[Entry]) -> str:
    dtypes = sorted({str(e.dtype).removeprefix("torch.") for e in entries})
    size = in_units(sum(e.size_bytes for e in entries))
    return f"{part:<12} {len(entries):>4} tensors, {size}, {' and '.join(dtypes)}"
