"""Whether an uploaded clip can be read, found out in a process of its own.

A file of a few bytes can make a demuxer take gigabytes, and decoders of video have had worse. So
the first reading happens where memory and time are bounded and where a crash takes nobody along;
only a clip that passes here is kept, and read again wherever its session begins. One clip at a
time, so that uploads cannot take a machine from its streams.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from dataclasses import asdict
from typing import Any

from echo_ray import wire
from echo_ray.config import LimitsSection
from echo_ray.errors import ClipInvalid, ClipTooLarge, EchoError
from echo_ray.session.engine_port import StreamShape

MEMORY_BYTES = 2 * 2**30
"""Address space of the reading process, libraries included."""
CPU_S = 30
LIMIT_S = 120.0
"""Wall time, for a machine with other work."""
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
_HEAD = struct.Struct(">I")


class ClipChecker:
    """Reads clips one after the other; call it from threads."""

    def __init__(self, shape: StreamShape, limits: LimitsSection) -> None:
        self._head = json.dumps([asdict(shape), asdict(limits)]).encode()
        self._one_at_a_time = threading.Lock()

    def frames(self, data: bytes) -> int:
        """How many frames `read_clip` makes of the clip. Raises `ClipInvalid`, `ClipTooLarge`."""
        with self._one_at_a_time:
            return _verdict(self._read(data))

    def _read(self, data: bytes) -> subprocess.CompletedProcess[bytes]:
        try:
            return subprocess.run(
                [sys.executable, "-m", __name__],
                input=_HEAD.pack(len(self._head)) + self._head + data,
                capture_output=True,
                timeout=LIMIT_S,
                check=False,
                env=_environment(),
            )
        except subprocess.TimeoutExpired as error:
            raise _too_slow(f"{LIMIT_S:.0f} s") from error


def _environment() -> dict[str, str]:
    """What the reading process needs to start, and no secret of this one."""
    kept = {k: v for k, v in os.environ.items() if k in ("LD_LIBRARY_PATH", "PATH")}
    # numpy takes address space for every thread it might use.
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **_ONE_THREAD}


def _verdict(done: subprocess.CompletedProcess[bytes]) -> int:
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {}
    if "error" in answer:
        raise wire.error_from(answer["error"])
    if "frames" in answer:
        return int(answer["frames"])
    if -done.returncode in (signal.SIGXCPU, signal.SIGKILL):
        raise _too_slow(f"{CPU_S} s of computing")
    raise ClipInvalid(
        f"clip cannot be read within {MEMORY_BYTES} bytes of memory (it ended with "
        f"{done.returncode}); send a video that plays elsewhere",
        param="clip",
    )


def _too_slow(limit: str) -> ClipTooLarge:
    return ClipTooLarge(
        f"clip takes more than {limit} to decode; lower its frame rate or its size", param="clip"
    )


def main() -> None:
    """The reading process: a clip from standard input, the verdict to standard output."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    given = sys.stdin.buffer
    size = _HEAD.unpack(given.read(_HEAD.size))[0]
    shape, limits = json.loads(given.read(size))
    answer: dict[str, Any]
    try:
        answer = {"frames": _count(given.read(), StreamShape(**shape), LimitsSection(**limits))}
    except EchoError as error:
        answer = {"error": error.to_dict()}
    sys.stdout.write(json.dumps(answer))


def _count(data: bytes, shape: StreamShape, limits: LimitsSection) -> int:
    # Here, so that the checking process itself never loads a decoder.
    from echo_ray.engine.upload import count_frames

    return count_frames(data, shape, limits)


if __name__ == "__main__":
    main()
