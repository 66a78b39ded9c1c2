"""How a replica learns that it is to go away. Every private call of Ray and of Python is here.

Serve stops the replica (scale-down, new code, shutdown): it calls `__del__`, which is public, and
    does so at once, since no request is ever open. How long that may take is private.
The node drains (`ray drain-node`, a spot notice, the autoscaler): which nodes do, is private.
SIGTERM to the process (`ray stop`, the end of a pod): Ray makes a normal exit of it, for which
    Python has a private hook that comes before the threads are shut down.

Ray is pinned. What is missing in another release is found at the start and said in the log; then
the replica goes on without, and its sessions are taken over after its death instead of before.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from ray import serve

from echo_ray.clock import Clock
from echo_ray.serve.telemetry import log

LOOK_S = 1.0
"""A replica asks this often whether its node drains."""


def stop_budget_s() -> float | None:
    """Seconds that Serve gives this replica from a stop to a kill; None if it cannot be known."""
    try:
        return float(serve.get_replica_context()._deployment_config.graceful_shutdown_timeout_s)
    except Exception as error:
        log(logging.WARNING, "stop_budget_unknown", reason=repr(error))
        return None


def draining_nodes() -> Mapping[str, int]:
    """Nodes that drain, by id, each with its deadline in wall milliseconds; 0: none is set."""
    from ray._private.state import state

    found = state.get_draining_nodes()
    return {str(node_id): int(deadline_ms) for node_id, deadline_ms in found.items()}


def before_exit(call: Callable[[], None]) -> None:
    """Let `call` be made when the interpreter ends, while all threads still work."""
    try:
        # `atexit` comes too late: thread pools take no more work by then.
        threading._register_atexit(call)  # type: ignore[attr-defined]
    except Exception as error:
        log(logging.WARNING, "exit_unseen", reason=repr(error))


class NodeWatch:
    """A thread that tells once when this node drains.

    `drained` is called with the seconds that are left, or with None if there is no deadline.
    """

    def __init__(
        self,
        node_id: str,
        drained: Callable[[float | None], None],
        clock: Clock,
        nodes: Callable[[], Mapping[str, int]] = draining_nodes,
    ) -> None:
        self._node_id = node_id
        self._drained = drained
        self._clock = clock
        self._nodes = nodes
        self._thread = threading.Thread(target=self._run, name="node", daemon=True)

    def start(self) -> None:
        """Begin to look, if this release of Ray tells."""
        try:
            self._nodes()
        except Exception as error:
            log(logging.WARNING, "node_drain_unseen", reason=repr(error))
            return
        self._thread.start()

    def _run(self) -> None:
        while not self.look():
            time.sleep(LOOK_S)

    def look(self) -> bool:
        """Whether the node drains; if it does, that is told."""
        try:
            deadline_ms = self._nodes().get(self._node_id)
        except Exception as error:
            # The head of the cluster is away for a while.
            log(logging.DEBUG, "node_drain_unknown", reason=repr(error))
            return False
        if deadline_ms is None:
            return False
        left_s = deadline_ms / 1000 - self._clock.wall() if deadline_ms > 0 else None
        self._drained(None if left_s is None else max(0.0, left_s))
        return True
