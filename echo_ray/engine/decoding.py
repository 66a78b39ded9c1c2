"""A stream's decoder on one device: a value where it runs eagerly, a place where it is recorded.

A recorded call is bound to its addresses, so each stream decodes in a place of its own: room for
its past, with the recordings over it. A place is leased at a stream's first decoding, given back
when the session is closed, and leased again; its past is set when it is leased, in the lane that
decodes, so that nothing of one session is left to the next.

Shapes: B batch, F latent frames, C channels, h w latents, N pixel frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from weakref import WeakSet

import torch
from torch import Tensor

from echo_ray.engine.graphs import Graphs, Recorder
from echo_ray.engine.lanes import Lanes
from echo_ray.engine.slices import Slices
from echo_ray.model.codec import Codec, CodecState
from echo_ray.model.history import BEGUN

PLACES_KEPT: Final = 4
"""Free places that stay allocated for the next sessions."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Place:
    """The past of one stream at addresses that never change, and the recordings over it."""

    past: CodecState
    graphs: Graphs

    @property
    def size_bytes(self) -> int:
        """Everything that stays allocated; what a recording keeps for itself the device counts."""
        tensors = [*self.past.values(), *self.graphs.inputs.tensors()]
        return sum(t.untyped_storage().nbytes() for t in tensors)


@dataclass(slots=True)
class Decoder:
    """Where a stream stands: `state`, or once it has a place the past there and `begun`."""

    state: CodecState
    begun: bool = False
    place: Place | None = None


class Decoders:
    """All decoding of one engine. Not thread-safe: the engine's thread decodes and gives back."""

    def __init__(self, codec: Codec, lanes: Lanes, recorder: Recorder | None) -> None:
        """`recorder`: records decodings to be replayed, and nothing else; None: all run eagerly."""
        self._codec = codec
        self._lanes = lanes
        self._recorder = recorder
        self._free: list[Place] = []
        self._all: WeakSet[Place] = WeakSet()

    def start(self) -> Decoder:
        """The decoder of a new stream."""
        return Decoder(self._codec.initial_state())

    def rebuilding(self, decoder: Decoder, latest_BFChw: Tensor, made: int) -> Slices[None]:
        """Bring a new stream's decoder to where one of `made` latents stands, a latent a slice.

        `latest_BFChw`: the last of them, at least as many as the codec is rebuilt from.
        """
        held = latest_BFChw.shape[1]
        count = min(self._codec.rebuild_latents, held)
        if count < made:
            decoder.state = self._codec.midstream_state()
        # Behind what made the latents, and not behind what others launch between two slices.
        ready = self._lanes.mark()
        for index in range(held - count, held):
            yield
            # Where the live one is made, so that the next decode finds it there.
            with self._lanes.decoding(ready, [latest_BFChw]):
                self.decode(decoder, latest_BFChw[:, index : index + 1])

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def size_bytes(self) -> int:
        """What all places take, leased ones too; what is decoded eagerly has none."""
        return sum(place.size_bytes for place in self._all)

    def decode(self, decoder: Decoder, latents_BFChw: Tensor) -> Tensor:
        """Frames [B, N, 3, H, W] of the stream's next latents; see `Codec.decode`."""
        if self._recorder is None:
            frames, decoder.state = self._codec.decode(latents_BFChw, decoder.state)
            return frames
        replayed = self._replayed(decoder, latents_BFChw, self._recorder)
        return torch.cat([frames.clone() for frames in replayed], dim=1)

    def close(self, decoder: Decoder) -> None:
        """Give the place back; the stream is not decoded any more. Twice does no harm."""
        place, decoder.place = decoder.place, None
        if place is not None:
            place.graphs.inputs.forget()
            if len(self._free) < PLACES_KEPT:
                self._free.append(place)

    def _replayed(
        self, decoder: Decoder, latents_BFChw: Tensor, recorder: Recorder
    ) -> Iterator[Tensor]:
        """The frames of each latent in turn, until the next one overwrites them."""
        place = decoder.place or self._settle(decoder, latents_BFChw[:, 0], recorder)
        for latent_BChw in latents_BFChw.unbind(1):
            yield self._recorded(place, latent_BChw, first=not decoder.begun)
            decoder.begun = True

    def _settle(self, decoder: Decoder, latent_BChw: Tensor, recorder: Recorder) -> Place:
        """Lease a place, with a past of zeros, to a stream of which nothing was decoded here."""
        place = self._free.pop() if self._free else self._new_place(latent_BChw, recorder)
        for past in place.past.values():
            past.zero_()
        decoder.begun = bool(decoder.state[BEGUN])
        decoder.state, decoder.place = {}, place
        return place

    def _new_place(self, latent_BChw: Tensor, recorder: Recorder) -> Place:
        """A place with both its recordings, which leave something behind in it."""
        place = Place(self._codec.fixed_state(latent_BChw), Graphs(recorder))
        self._all.add(place)
        for first in (True, False):
            self._recorded(place, torch.zeros_like(latent_BChw), first=first)
        return place

    def _recorded(self, place: Place, latent_BChw: Tensor, *, first: bool) -> Tensor:
        frames = place.graphs.run(
            first,
            [latent_BChw],
            lambda parts: self._codec.decode_fixed(parts[0], place.past, first=first),
        )
        assert frames is not None
        return frames
