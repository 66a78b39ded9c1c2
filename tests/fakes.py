"""Stand-ins that tests hand to the code: time that moves only when told, an engine of hashes."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence

from echo_ray.errors import EngineError, InvalidRequestError, PromptError, SnapshotForeign
from echo_ray.session.chunk import Chunk, DriftReading, frames_digest, named_words
from echo_ray.session.engine_port import StreamShape
from echo_ray.session.snapshot import Buffer, Snapshot


class FakeClock:
    """A clock that stands still until `advance` moves it."""

    def __init__(self, wall: float = 1_700_000_000.0, monotonic: float = 1_000.0) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._lock = threading.Lock()

    def wall(self) -> float:
        with self._lock:
            return self._wall

    def monotonic(self) -> float:
        with self._lock:
            return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass on both readings."""
        with self._lock:
            self._wall += seconds
            self._monotonic += seconds


UNKNOWN = ("lovely", "sunset")


class FakeState:
    """The state of a `FakeEngine` session: a hidden hash that every step folds on."""

    def __init__(self, hidden: bytes, prompt: str, next_index: int, point_every: int) -> None:
        self.hidden = hidden
        self.prompt = prompt
        self.next_index = next_index
        self.name = prompt
        self.broken = False
        self.stepping = False
        self._point_every = point_every

    @property
    def at_point(self) -> bool:
        return self._point_every > 0 and self.next_index % self._point_every == 0


class FakeStep:
    """Slices of which the last one does it all."""

    def __init__(self, engine: FakeEngine, state: FakeState, prompts: Sequence[str]) -> None:
        self._engine, self._state, self._prompts = engine, state, prompts
        self._left = engine.slices

    def advance(self) -> Chunk | None:
        if not self._left:
            raise EngineError("the step is over")
        self._left -= 1
        self._engine.advanced.append(self._state.name)
        if self._left:
            return None
        self._state.stepping = False
        return self._engine.step(self._state, self._prompts)


class FakeLoading:
    """Slices of which the last one does it all."""

    def __init__(self, engine: FakeEngine, make: Callable[[], FakeState]) -> None:
        self._engine, self._make = engine, make
        self._left = engine.load_slices
        engine.arriving.append(self)

    def advance(self) -> FakeState | None:
        if not self._left:
            raise EngineError("the load is over")
        self._left -= 1
        if self._left:
            return None
        self.close()
        return self._make()

    def close(self) -> None:
        self._left = 0
        if self in self._engine.arriving:
            self._engine.arriving.remove(self)


class FakeEngine:
    """An engine without a model: 8 x 8 frames that follow from clip, seed, prompts and every step.

    It does not know the words in `UNKNOWN`.
    `delay_s` is slept in each step, which has so many `slices`; opening and loading have
    `load_slices`. `failing` holds chunk indices whose
    next step fails, once each.
    `fingerprint` changes the bits, as another kind of device would.
    """

    def __init__(
        self,
        *,
        point_every: int = 4,
        fps: int = 16,
        frames_per_chunk: int = 4,
        delay_s: float = 0.0,
        slices: int = 3,
        fingerprint: str = "fake",
        refuses: str = "refused",
        load_slices: int = 3,
    ) -> None:
        self.shape = StreamShape(
            model="echo-tiny",
            fps=fps,
            width=8,
            height=8,
            frames_per_chunk=frames_per_chunk,
            first_chunk_frames=1,
            point_every=point_every,
        )
        self.fingerprint = fingerprint
        self.delay_s = delay_s
        self.slices = slices
        self.load_slices = load_slices
        self.refuses = refuses
        self.failing: list[int] = []
        self.fell_back: dict[str, int] = {}
        self.advanced: list[str] = []
        """For every slice, the prompt that its session was opened with."""
        self.stepped: list[int] = []
        self.stepped_at_s: list[float] = []
        self.loaded: list[int] = []
        self.opened_with: list[int] = []
        """Frames of the clip at every `open`."""
        self.held: list[FakeState] = []
        """States that were opened or loaded and not closed."""
        self.arriving: list[FakeLoading] = []
        """Loads that are not over and were not closed."""
        self.may_step = threading.Event()
        self.may_step.set()

    def open(self, prompt: str, seed: int, first_frames: bytes = b"") -> FakeState:
        if prompt == self.refuses:
            raise PromptError(f"prompt {prompt!r} is refused by the fake engine")
        count, rest = divmod(len(first_frames), 8 * 8 * 3)
        beyond = count - self.shape.first_chunk_frames
        if rest or (first_frames and (beyond < 0 or beyond % self.shape.frames_per_chunk)):
            raise InvalidRequestError(f"{len(first_frames)} bytes are no whole chunks")
        self.opened_with.append(count)
        hidden = _hash(b"open", prompt, seed, hashlib.sha256(first_frames).digest())
        return self._hold(FakeState(hidden, prompt, 0, self.shape.point_every))

    def begin_open(self, prompt: str, seed: int, first_frames: bytes = b"") -> FakeLoading:
        return FakeLoading(self, lambda: self.open(prompt, seed, first_frames))

    def begin_load(self, snapshot: Snapshot) -> FakeLoading:
        return FakeLoading(self, lambda: self.load(snapshot))

    def begin(self, state: FakeState, prompts: Sequence[str] = ()) -> FakeStep:
        if state.stepping:
            raise EngineError("the state is in the middle of a step")
        state.stepping = True
        return FakeStep(self, state, prompts)

    def step(self, state: FakeState, prompts: Sequence[str] = ()) -> Chunk:
        if not self.may_step.wait(30) or state.broken:
            raise EngineError("the state is broken by an earlier failure")
        if self.delay_s:
            time.sleep(self.delay_s)
        index = state.next_index
        self.stepped.append(index)
        self.stepped_at_s.append(time.monotonic())
        if index in self.failing:
            self.failing.remove(index)
            state.broken = True
            raise EngineError(f"chunk {index} fails, as it was told to")
        for prompt in prompts:
            state.prompt = prompt
            state.hidden = _hash(b"switch", state.hidden, prompt)
        state.hidden = _hash(b"step", state.hidden, index)
        state.next_index += 1
        if state.at_point:
            state.hidden = _hash(b"point", state.hidden)
        count = self.shape.frames_in(index)
        frames = b"".join(
            hashlib.shake_256(_hash(state.hidden, self.fingerprint, n)).digest(8 * 8 * 3)
            for n in range(count)
        )
        return Chunk(
            index=index,
            frames=frames,
            num_frames=count,
            height=8,
            width=8,
            digest=frames_digest(frames),
            drift=DriftReading(index / 100),
            prompt=state.prompt,
            ignored_words=named_words(w for w in state.prompt.split() if w in UNKNOWN),
            stage_seconds={"denoise": self.delay_s, "decode": 0.0},
        )

    def saving(self, state: FakeState) -> Callable[[], Snapshot]:
        if not state.at_point or state.broken or state.stepping:
            raise EngineError(f"chunk {state.next_index} is no point")
        header = {"prompt": state.prompt, "next_index": state.next_index}
        hidden = {"hidden": Buffer("uint8", (32,), state.hidden)}
        return lambda: Snapshot(self.fingerprint, header, hidden)

    def save(self, state: FakeState) -> Snapshot:
        return self.saving(state)()

    def close(self, state: FakeState) -> None:
        state.broken = True
        if state in self.held:
            self.held.remove(state)

    def state_bytes(self, state: FakeState) -> int:
        return len(state.hidden)

    def fallbacks(self) -> dict[str, int]:
        return dict(self.fell_back)

    def memory(self) -> dict[str, int]:
        return {"resident": 4096}

    def load(self, snapshot: Snapshot) -> FakeState:
        if snapshot.fingerprint != self.fingerprint:
            raise SnapshotForeign(f"snapshot of {snapshot.fingerprint!r}, not {self.fingerprint!r}")
        header = snapshot.header
        self.loaded.append(header["next_index"])
        hidden, at = snapshot.tensors["hidden"].data, header["next_index"]
        return self._hold(FakeState(hidden, header["prompt"], at, self.shape.point_every))

    def _hold(self, state: FakeState) -> FakeState:
        self.held.append(state)
        return state


def build_fake_engine(section: object) -> FakeEngine:
    """The factory for replicas in processes of their own."""
    return FakeEngine(delay_s=0.01)


def undisturbed(
    engine: FakeEngine,
    prompt: str,
    seed: int,
    chunks: int,
    switches: dict[int, list[str]],
    first_frames: bytes = b"",
) -> list[str]:
    """Digests of a run that nothing interrupts; `switches`: prompts by chunk."""
    state = engine.open(prompt, seed, first_frames)
    return [engine.step(state, switches.get(n, ())).digest for n in range(chunks)]


def _hash(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()
