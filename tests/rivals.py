"""Processes that do the same at the same moment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence


def race(script: str, arguments: Sequence[Sequence[str]], timeout_s: float = 40) -> list[str]:
    """Run the script in a process for each row of arguments, all let go at once; their outputs.

    The script prints "ready", waits for a line, and then prints what it has to tell.
    """
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", script, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for words in arguments
    ]
    try:
        for rival in rivals:
            assert rival.stdout is not None
            assert rival.stdout.readline() == "ready\n"
        for rival in rivals:
            assert rival.stdin is not None
            rival.stdin.write("go\n")
            rival.stdin.flush()
        return [rival.communicate(timeout=timeout_s)[0] for rival in rivals]
    finally:
        for rival in rivals:
            rival.kill()
            rival.wait()
