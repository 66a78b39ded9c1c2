"""What all sessions of a replica work with on the engine thread; one state, one chunk of one."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

from echo_ray.clock import Clock
from echo_ray.errors import EngineError, SnapshotCorrupt
from echo_ray.serve.accounts import ProgressAccounts
from echo_ray.serve.fetch import Fetch, Fetched
from echo_ray.serve.segments import Segment
from echo_ray.serve.snapshot_writer import SnapshotWriter
from echo_ray.session.engine_port import Engine, State, Step
from echo_ray.session.fingerprint import ResumePolicy, allows, fit, unfit
from echo_ray.session.replay import ControlLog, EventMarks
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

    def returning(self, fetched: Fetched) -> Returning:
        """Begin to make the state at the fetched point.

        Raises `NoFittingReplica` where this engine may not go on with the session.
        """
        made_by, ours = fetched.record.fingerprint, self.engine.fingerprint
        if made_by and not allows(self.policy, fit(made_by, ours)):
            raise unfit(made_by, ours)
        return Returning(self, fetched)

    def begin(self, state: State, controls: ControlLog) -> Making:
        """Begin to make the state's next chunk; the state is lost until it is there."""
        index = state.next_index
        step = self.engine.begin(state, controls.prompts(index))
        return Making(self, step, controls.marks(index), index)


class Returning:
    """A state in hand. Whatever it holds is given back unless it comes to its end."""

    def __init__(self, bench: Bench, fetched: Fetched) -> None:
        self.fetched = fetched
        self._engine = engine = bench.engine
        if fetched.snapshot is None:
            record = fetched.record
            self._loading = engine.begin_open(record.prompt, record.seed, fetched.first_frames)
        else:
            self._loading = engine.begin_load(fetched.snapshot)

    def advance(self) -> State | None:
        """Do the next slice; the state after the last. Raises `SnapshotError`, and as `open`."""
        state, index = self._loading.advance(), self.fetched.index
        if state is not None and state.next_index != index:
            self._engine.close(state)
            raise SnapshotCorrupt(
                f"the snapshot is of chunk {state.next_index}, its reference says {index}; "
                "it is of another point or another session"
            )
        return state

    def close(self) -> None:
        """Leave it where it is."""
        self._loading.close()


class Making:
    """A chunk in hand. Left where it is, it costs the state and nothing else."""

    def __init__(self, bench: Bench, step: Step, marks: EventMarks, index: int) -> None:
        self.index = index
        self._bench = bench
        self._step = step
        self._marks = marks
        self._seconds = 0.0

    def advance(self) -> Segment | None:
        """Do the next slice; the segment after the last. Whatever is raised, the state is lost.

        Its seconds are those of its own slices, not of what the device did in between.
        """
        clock, shape, index = self._bench.clock, self._bench.engine.shape, self.index
        began_s = clock.monotonic()
        chunk = self._step.advance()
        self._seconds += clock.monotonic() - began_s
        if chunk is None:
            return None
        if chunk.index != index:
            raise EngineError(f"the engine made chunk {chunk.index} when {index} was asked for")
        return Segment(
            chunk=chunk,
            marks=self._marks,
            start_frame=shape.first_frame(index),
            start_s=shape.start_s(index),
            chunk_seconds=self._seconds,
        )
