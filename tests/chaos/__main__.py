"""`make chaos`: random faults against a real cluster, and viewers who must not notice a loss.

    python -m chaos --seed 1 --faults 50 --out runs/chaos

Exit code 0 if no segment was lost, duplicated or different, else 1; goals of time are reported.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

from chaos.cage import adopt_orphans, die_with_parent, find_cage, kill_descendants

START_S = 180
FAULT_S = 20
INSIDE = "ECHO_CHAOS_INSIDE"


def main() -> int:
    wish = _arguments()
    if os.environ.get(INSIDE):
        from chaos.run import run

        return run(wish, caged=os.environ[INSIDE] == "caged")
    # A shell's background job begins with SIGINT ignored, and this one is to end by it.
    for end in (signal.SIGTERM, signal.SIGINT):
        signal.signal(end, _interrupt)
    adopt_orphans()
    cage = find_cage()
    if cage.refusal:
        sys.stderr.write(f"no namespaces here, so no cables are cut: {cage.refusal}\n")
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    command = [*cage.prefix, sys.executable, "-m", "chaos", *sys.argv[1:], "--folder", str(folder)]
    inside = {INSIDE: "caged" if cage.prefix else "open"}
    limit_s = START_S + FAULT_S * wish.faults
    # A session of its own, so that Ctrl-C reaches this process only, which ends all the others.
    child = subprocess.Popen(
        command,
        env={**os.environ, **inside},
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    try:
        return child.wait(limit_s)
    except subprocess.TimeoutExpired:
        sys.stderr.write(f"stopped: not done after {limit_s} s\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    finally:
        kill_descendants()
        _keep_logs(folder, wish.out / "logs")
        shutil.rmtree(folder, ignore_errors=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--engine", choices=("fake", "tiny"), default="fake")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="folder for results")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    wish = parser.parse_args()
    if not 1 <= wish.faults <= 10_000:
        parser.error(f"--faults: {wish.faults} is not allowed: 1 to 10000")
    return wish


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _keep_logs(folder: Path, out: Path) -> None:
    """What routers, replicas, servers and Ray Serve's controllers said."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    kept = ("*.log", "*/session_*/logs/worker-*.err", "*/session_*/logs/serve/controller_*.log")
    for log in (file for pattern in kept for file in folder.glob(pattern)):
        if log.stat().st_size:
            shutil.copy(log, out / log.name)


if __name__ == "__main__":
    sys.exit(main())
