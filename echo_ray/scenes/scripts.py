"""What happens in a clip, chunk by chunk.

Attributes change, and objects appear and disappear, at chunk borders only; what is not to be seen
goes on moving. The one exception is an object that leaves or enters through the frame's border,
which takes it a chunk or two.

Shapes: K chunks, T frames, O objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from echo_ray.errors import ConfigError
from echo_ray.scenes.world import BACKGROUNDS, COLOURS, RADII, SHAPES, SPEEDS, Bools, Ints

KINDS: dict[str, float] = {
    "steady": 0.16,
    "switch": 0.24,
    "add": 0.08,
    "remove": 0.08,
    "cross": 0.10,
    "border": 0.10,
    "hide": 0.20,
    "empty": 0.04,
}
"""Every kind of clip and its share. What each shows is told at the function of its name below."""
LEAST_CHUNKS = {"switch": 2, "add": 2, "remove": 2, "border": 3, "hide": 4}
"""Shorter clips have no room for these."""
TWO_OBJECTS = 0.3
"""Share of two objects where the kind does not decide."""
LONGEST_HIDDEN = 12
EMPTY_FIRST = 0.75
"""Share of clips with a hidden object whose first chunk does not show it."""
FAST, BIG = list(SPEEDS).index("quickly"), list(RADII).index("big")


@dataclass(frozen=True, kw_only=True)
class Away:
    """An object's way through the frame's border and back, in chunks; either end may be outside
    of the clip."""

    leaves: int
    """The chunk at whose start the object touches the border from inside."""
    returns: int
    """The chunk at whose start it touches it again, wholly inside."""


@dataclass(frozen=True, kw_only=True)
class Script:
    """What happens in a clip, chunk by chunk; indices into the tables of `world`."""

    kind: str
    background_K: Ints
    colour_KO: Ints
    shape_KO: Ints
    visible_KO: Bools
    """Whether any part of an object is to be seen in a chunk."""
    border_KO: Bools
    """Whether the frame's border cuts an object off in some frame of a chunk."""
    size_O: Ints
    speed_O: Ints
    away: Away | None = None

    @property
    def hidden_K(self) -> Bools:
        """Chunks that show nothing but background."""
        return np.asarray(~self.visible_KO.any(axis=1))


@dataclass(kw_only=True)
class _Draft:
    """A script in the making: one steady scene until a kind changes it."""

    chunks: int
    background_K: Ints
    colour_KO: Ints
    shape_KO: Ints
    visible_KO: Bools
    size_O: Ints
    speed_O: Ints
    away: Away | None = None


def chunk_of_frames(chunks: int, first: int, later: int) -> Ints:
    """The chunk each frame belongs to: `first` frames in chunk 0, `later` in every other."""
    return np.repeat(np.arange(chunks), [first] + [later] * (chunks - 1))


def with_share(kind: str, share: float) -> dict[str, float]:
    """The shares of all kinds when this one has the given share of all clips."""
    rest = 1 - KINDS[kind]
    others = {name: old * (1 - share) / rest for name, old in KINDS.items()}
    return others | {kind: share}


def write_script(
    rng: np.random.Generator,
    chunks: int,
    kind: str | None = None,
    shares: Mapping[str, float] = KINDS,
    two_objects: float = TWO_OBJECTS,
) -> Script:
    """One clip of the given kind, or of a kind drawn by its share."""
    if kind is None:
        feasible = [k for k in KINDS if chunks >= LEAST_CHUNKS.get(k, 1)]
        weights = np.array([shares[k] for k in feasible])
        kind = str(rng.choice(feasible, p=weights / weights.sum()))
    elif kind not in KINDS:
        raise ConfigError(f"kind {kind!r}: unknown; one of {', '.join(KINDS)}")
    elif chunks < LEAST_CHUNKS.get(kind, 1):
        raise ConfigError(f"kind {kind!r}: needs {LEAST_CHUNKS[kind]} chunks or more, not {chunks}")
    objects = {"add": 2, "remove": 2, "cross": 2, "border": 1, "hide": 1, "empty": 1}.get(kind)
    if objects is None:
        objects = 2 if rng.random() < two_objects else 1
    draft = _Draft(
        chunks=chunks,
        background_K=np.full(chunks, rng.integers(len(BACKGROUNDS))),
        colour_KO=np.tile(rng.permutation(len(COLOURS))[:objects], (chunks, 1)),
        shape_KO=np.tile(rng.integers(len(SHAPES), size=objects), (chunks, 1)),
        visible_KO=np.ones((chunks, objects), dtype=bool),
        size_O=rng.integers(len(RADII), size=objects),
        speed_O=rng.integers(len(SPEEDS), size=objects),
    )
    if kind in _CHANGES:
        _CHANGES[kind](rng, draft)
    return Script(
        kind=kind,
        background_K=draft.background_K,
        colour_KO=draft.colour_KO,
        shape_KO=draft.shape_KO,
        visible_KO=draft.visible_KO,
        border_KO=np.zeros_like(draft.visible_KO),
        size_O=draft.size_O,
        speed_O=draft.speed_O,
        away=draft.away,
    )


def _switch(rng: np.random.Generator, draft: _Draft) -> None:
    """Once or twice, one to three of background, colours and shapes become others."""
    starts = np.arange(1, draft.chunks)
    for start in rng.choice(starts, size=min(len(starts), 2), replace=False):
        changed = rng.permutation(3)[: rng.choice((1, 2, 3), p=(0.6, 0.25, 0.15))]
        if 0 in changed:
            _other(rng, draft.background_K, int(start), len(BACKGROUNDS))
        if 1 in changed:
            # All by the same step, so that they stay different from each other.
            _other(rng, draft.colour_KO, int(start), len(COLOURS))
        if 2 in changed:
            _other(rng, draft.shape_KO, int(start), len(SHAPES))


def _other(rng: np.random.Generator, values: Ints, start: int, among: int) -> None:
    values[start:] = (values[start:] + rng.integers(1, among)) % among


def _add(rng: np.random.Generator, draft: _Draft) -> None:
    """A second object appears; sometimes the first one disappears later."""
    appear = int(rng.integers(1, draft.chunks))
    draft.visible_KO[:appear, 1] = False
    if rng.random() < 0.25 and appear + 1 < draft.chunks:
        draft.visible_KO[rng.integers(appear + 1, draft.chunks) :, 0] = False


def _remove(rng: np.random.Generator, draft: _Draft) -> None:
    """One of two objects disappears; sometimes the other one later, too."""
    leave = int(rng.integers(1, draft.chunks))
    first = int(rng.integers(2))
    draft.visible_KO[leave:, first] = False
    if rng.random() < 0.25 and leave + 1 < draft.chunks:
        draft.visible_KO[rng.integers(leave + 1, draft.chunks) :, 1 - first] = False


def _border(rng: np.random.Generator, draft: _Draft) -> None:
    """The object leaves through the frame's border and comes in again where it went out.

    It is quick: a slow one would be cut off for many chunks. Its way out or in may lie before or
    behind the clip.
    """
    draft.speed_O[:] = FAST
    crossing = 2 if draft.size_O[0] == BIG else 1
    away = 2 * crossing + int(rng.integers(1, 7))
    leaves = int(rng.integers(1 - away + crossing, draft.chunks - crossing + 1))
    # The first chunk is shorter than others and might not be enough for the way out.
    leaves = leaves or 1
    draft.away = Away(leaves=leaves, returns=leaves + away)


def _hide(rng: np.random.Generator, draft: _Draft) -> None:
    """The object disappears and comes back where its hidden motion has brought it by then.

    Mostly the first chunk is empty, so that the sink does not know the object either, and the
    absence longer than a window of three chunks, so that nothing but a memory can.
    """
    appear = int(rng.random() < EMPTY_FIRST) if draft.chunks > 4 else 0
    leave = appear + int(rng.integers(1, min(3, draft.chunks - 3 - appear) + 1))
    longest = min(LONGEST_HIDDEN, draft.chunks - leave - 1)
    hidden = int(rng.integers(min(3, longest), longest + 1))
    draft.visible_KO[:appear] = False
    draft.visible_KO[leave : leave + hidden] = False


def _empty(rng: np.random.Generator, draft: _Draft) -> None:
    """Nothing but a background, which may change once."""
    draft.visible_KO[:] = False
    if draft.chunks > 1 and rng.random() < 0.5:
        _other(rng, draft.background_K, int(rng.integers(1, draft.chunks)), len(BACKGROUNDS))


_CHANGES: dict[str, Callable[[np.random.Generator, _Draft], None]] = {
    "switch": _switch,
    "add": _add,
    "remove": _remove,
    "border": _border,
    "hide": _hide,
    "empty": _empty,
}
