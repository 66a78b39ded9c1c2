"""Namespaces of a run's own: what happens in them touches nothing outside and ends with them.

In a PID namespace the kernel kills every process when the first one is gone, however it went; in a
network namespace nodes have addresses and cables of their own, which can be cut. Where a machine
allows no namespaces, nodes live on loopback addresses and no cable is cut.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
HEAD = "10.77.0.1"
STORES = "10.77.0.2"
NOBODY = "02:00:00:00:00:fe"
"""A hardware address that no cable leads to."""
_TRY = "ip link add br0 type bridge && ip link add v0 type veth peer name e0"


@dataclass(frozen=True, slots=True)
class Cage:
    """How to start the first process of a run."""

    prefix: tuple[str, ...]
    refusal: str | None = None
    """Why there are no namespaces, with the command that was refused."""


def find_cage() -> Cage:
    """The namespaces that this machine allows: all of them, or none."""
    user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    flags = ("--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc")
    prefix = ("unshare", *user, *flags)
    command = [*prefix, "sh", "-c", _TRY]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        return Cage((), f"{' '.join(command)}: {e}")
    if tried.returncode:
        return Cage((), f"{' '.join(command)}: {tried.stderr.strip()}")
    return Cage(prefix)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def kill_descendants() -> int:
    """Kill all that came of this process; returns how many there were."""
    killed = 0
    while family := psutil.Process().children(recursive=True):
        for process in family:
            try:
                process.kill()
                killed += 1
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(family, timeout=5)
    return killed


@dataclass
class Wiring:
    """The network between nodes: a bridge with a cable to each, or loopback."""

    caged: bool
    _holders: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    """A process that keeps the namespace of each node."""

    @property
    def head(self) -> str:
        return HEAD if self.caged else "127.0.0.2"

    @property
    def stores(self) -> str:
        return STORES if self.caged else "127.0.0.1"

    def address(self, node: int) -> str:
        return f"10.77.0.{10 + node}" if self.caged else f"127.0.0.{10 + node}"

    def prefix(self, node: int) -> list[str]:
        """What a command begins with that is to run on the node."""
        return ["nsenter", "-t", str(self._holders[node].pid), "-n"] if self.caged else []

    def lay(self, nodes: int) -> None:
        """Build the bridge and the cables."""
        if not self.caged:
            return
        _ip("link set lo up")
        _ip("link add br0 type bridge")
        _ip("link set br0 up")
        for address in (HEAD, STORES):
            _ip(f"addr add {address}/24 dev br0")
        for node in range(nodes):
            self._holders[node] = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
            _ip(f"link add v{node} type veth peer name e{node}")
            self._move(node)
            _ip(f"link set v{node} master br0 up")
            _ip("link set lo up", self.prefix(node))
            _ip(f"addr add {self.address(node)}/24 dev e{node}", self.prefix(node))
            _ip(f"link set e{node} up", self.prefix(node))

    def pull_out(self, node: int) -> None:
        """The node hears nobody and nobody hears it; nothing is refused, all is silent."""
        _ip(f"link set v{node} down")

    def plug_in(self, node: int) -> None:
        _ip(f"link set v{node} up")

    def deafen(self, node: int, address: str) -> None:
        """Nothing that the node sends reaches that address any more."""
        _ip(
            f"neigh replace {address} lladdr {NOBODY} dev e{node} nud permanent",
            self.prefix(node),
        )

    def mend(self, node: int, address: str) -> None:
        _ip(f"neigh del {address} dev e{node}", self.prefix(node))

    def _move(self, node: int) -> None:
        holder = self._holders[node].pid
        own = Path("/proc/self/ns/net").readlink()
        # The holder is in its own namespace only once it has become `sleep`.
        while Path(f"/proc/{holder}/ns/net").readlink() == own:
            pass
        _ip(f"link set e{node} netns {holder}")


def _ip(words: str, prefix: list[str] | None = None) -> None:
    subprocess.run([*(prefix or []), "ip", *words.split()], check=True, capture_output=True)
