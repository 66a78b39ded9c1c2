"""The process that reads a stranger's clip first."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable

import pytest
from uploads import SHAPE, memory_bomb, mp4

from echo_ray.config import LimitsSection
from echo_ray.engine import clip_check
from echo_ray.engine.clip_check import ClipChecker
from echo_ray.errors import ClipInvalid, ClipTooLarge

Run = Callable[..., subprocess.CompletedProcess[bytes]]


def test_a_clip_is_counted_and_a_refusal_keeps_its_words() -> None:
    checker = ClipChecker(SHAPE, LimitsSection(clip_side=100))
    assert checker.frames(mp4(32)) == 21
    with pytest.raises(ClipTooLarge, match="128 x 64; a side may have at most 100") as caught:
        checker.frames(mp4(3, width=128))
    assert caught.value.param == "clip"
    with pytest.raises(ClipInvalid, match="not an MP4"):
        checker.frames(b"text")


def test_a_clip_that_takes_all_memory_takes_that_of_its_reader_only() -> None:
    began = time.monotonic()
    with pytest.raises(ClipInvalid, match="cannot be read"):
        ClipChecker(SHAPE, LimitsSection()).frames(memory_bomb())
    assert time.monotonic() - began < 20


def ended(code: int, said: bytes = b"") -> Run:
    return lambda *a, **k: subprocess.CompletedProcess([], code, said, b"")


def test_a_reader_that_is_killed_or_crashes_or_hangs_is_a_refusal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hang(*args: object, **options: object) -> subprocess.CompletedProcess[bytes]:
        raise subprocess.TimeoutExpired("reader", 1)

    cases: list[tuple[Run, type[Exception], str]] = [
        (ended(-signal.SIGXCPU), ClipTooLarge, "30 s of computing"),
        (ended(-signal.SIGKILL), ClipTooLarge, "30 s of computing"),
        (ended(-signal.SIGSEGV), ClipInvalid, "it ended with -11"),
        (ended(1, b"Traceback"), ClipInvalid, "it ended with 1"),
        (hang, ClipTooLarge, "more than 120 s to decode"),
    ]
    for run, kind, words in cases:
        monkeypatch.setattr(clip_check.subprocess, "run", run)
        with pytest.raises(kind, match=words):
            ClipChecker(SHAPE, LimitsSection()).frames(b"clip")


def test_the_reader_gets_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def run(*args: object, **options: object) -> subprocess.CompletedProcess[bytes]:
        seen.update(options)
        return subprocess.CompletedProcess([], 0, b'{"frames": 9}', b"")

    monkeypatch.setenv("STORE_PASSWORD", "secret")
    monkeypatch.setattr(clip_check.subprocess, "run", run)
    assert ClipChecker(SHAPE, LimitsSection()).frames(b"clip") == 9
    assert "secret" not in repr(seen["env"])
