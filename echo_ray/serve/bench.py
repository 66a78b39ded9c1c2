"""What all sessions of a replica work with on the engine thread, and one step of a session."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

from echo_ray.clock import Clock
from echo_ray.errors import EngineError, SnapshotCorrupt
from echo_ray.serve.accounts import ProgressAccounts
from echo_ray.serve.fetch import Fetch, Fetched
from echo_ray.serve.segments import Segment
from echo_ray.serve.snapshot_writer import SnapshotWriter
from echo_ray.session.engine_port import Engine, State
from echo_ray.session.fingerprint import ResumePolicy, allows, fit, unfit
from echo_ray.session.replay import ControlLog
from echo_ray.storage.interface import Directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Engine, stores, threads and accounts of one replica."""

    engine: Engine
    directory: Directory
    fetch: Fetch
    fetchers: Executor
    writer: SnapshotWriter
    accounts: ProgressAccounts
    clock: Clock
    policy: ResumePolicy = ResumePolicy.EXACT

    def state_of(self, fetched: Fetched) -> State:
        """The state at the fetched point.

        Raises `NoFittingReplica` where this engine may not go on with the session, `SnapshotError`,
        `InvalidRequestError`.
        """
        made_by, ours = fetched.record.fingerprint, self.engine.fingerprint
        if made_by and not allows(self.policy, fit(made_by, ours)):
            raise unfit(made_by, ours)
        if fetched.snapshot is None:
            record = fetched.record
            return self.engine.open(record.prompt, record.seed, fetched.first_frames)
        state = self.engine.load(fetched.snapshot)
        if state.next_index != fetched.index:
            self.engine.close(state)
            raise SnapshotCorrupt(
                f"the snapshot is of chunk {state.next_index}, its reference says {fetched.index}; "
                "it is of another point or another session"
            )
        return state

    def step(self, state: State, controls: ControlLog) -> Segment:
        """Make the state's next chunk. Whatever is raised, the state is lost."""
        index, shape = state.next_index, self.engine.shape
        began_s = self.clock.monotonic()
        chunk = self.engine.step(state, controls.prompts(index))
        seconds = self.clock.monotonic() - began_s
        if chunk.index != index:
            raise EngineError(f"the engine made chunk {chunk.index} when {index} was asked for")
        return Segment(
            chunk=chunk,
            marks=controls.marks(index),
            start_frame=shape.first_frame(index),
            start_s=shape.start_s(index),
            chunk_seconds=seconds,
        )
