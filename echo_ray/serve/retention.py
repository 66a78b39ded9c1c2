"""What becomes of snapshots once they are written: the old ones go, those that matter are durable.

Nobody waits for it: a slow or absent durable store must delay no snapshot and no release.
"""

from __future__ import annotations

import threading

from echo_ray.errors import ConflictError, EchoError
from echo_ray.serve.accounts import ProgressAccounts
from echo_ray.serve.runner import SessionRunner
from echo_ray.session.owning import LeaseOver
from echo_ray.session.replay import newest_first, to_prune
from echo_ray.storage.interface import Directory, SnapshotStore


def make_newest_durable_soon(directory: Directory, store: SnapshotStore, session_id: str) -> None:
    """Let the session's newest recorded snapshot, if any, become durable; raises as directories."""
    refs = newest_first(directory.snapshots(session_id))
    if refs:
        store.make_durable_soon(session_id, refs[0].id)


class Pruner:
    """A thread that deletes old snapshots of sessions, one session after the other."""

    def __init__(
        self, directory: Directory, store: SnapshotStore, accounts: ProgressAccounts, *, kept: int
    ) -> None:
        self._directory = directory
        self._store = store
        self._accounts = accounts
        self._kept = kept
        self._waiting: dict[str, SessionRunner] = {}
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="prune", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, runner: SessionRunner) -> None:
        """Prune the session some time soon."""
        with self._wake:
            self._waiting[runner.session_id] = runner
            self._wake.notify()

    def stop(self, timeout_s: float) -> None:
        """End the thread after the session in hand; what is not pruned is so the next time."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._stopping:
                    self._wake.wait()
                if self._stopping:
                    return
                runner = self._waiting.pop(next(iter(self._waiting)))
            try:
                self._prune(runner)
            except LeaseOver:
                # The next owner prunes.
                continue
            except EchoError as error:
                self._accounts.store_failed(runner.session_id, "prune", error)

    def _prune(self, runner: SessionRunner) -> None:
        session_id = runner.session_id
        refs = self._directory.snapshots(session_id)
        if not to_prune(refs, kept=self._kept):
            return
        spared = self._store.newest_durable(session_id, [ref.id for ref in newest_first(refs)])
        for ref in to_prune(refs, kept=self._kept, spared=spared):
            runner.held()
            try:
                self._directory.drop_snapshot(session_id, ref.id)
            except ConflictError:
                # Pinned since it was listed: it stays.
                continue
            self._store.delete(session_id, ref.id)
