"""One forward pass of the transformer over a window, eager or through the arena's graphs.

Shapes: B batch, F frames, C H W latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from echo_ray.engine.cache import WindowCall
from echo_ray.engine.graphs import Graphs
from echo_ray.model.dit import DiT, Modulations, PromptKV


@dataclass(frozen=True, slots=True)
class Forward:
    """What a forward reads beside the weights and the window."""

    x_BFCHW: Tensor
    modulations: Modulations
    prompt: PromptKV
    call: WindowCall

    def flow(self, dit: DiT, graphs: Graphs | None) -> Tensor:
        """The chunk's flow, valid until the next forward; its keys and values are written."""

        def run(forward: Forward) -> Tensor:
            flow: Tensor = dit(forward.x_BFCHW, forward.modulations, forward.prompt, forward.call)
            return flow

        if graphs is None:
            return run(self)
        flow = graphs.run(
            ("denoise", *self._layout()), self._tensors(), lambda parts: run(self._over(parts))
        )
        assert flow is not None
        return flow

    def context(self, dit: DiT, graphs: Graphs | None) -> None:
        """Leave clean keys and values behind; there is no flow."""

        def run(forward: Forward) -> None:
            dit.remember(forward.x_BFCHW, forward.modulations, forward.prompt, forward.call)

        if graphs is None:
            run(self)
            return
        graphs.run(
            ("context", *self._layout()), self._tensors(), lambda parts: run(self._over(parts))
        )

    def _layout(self) -> tuple[int, ...]:
        """All that a recording fixes beside its addresses."""
        return (self.x_BFCHW.shape[1], *self.call.layout)

    def _tensors(self) -> list[Tensor]:
        prompt = [part for pair in self.prompt.layers for part in pair]
        table = self.modulations.table_VBFC
        return [self.x_BFCHW, table, self.call.query_rope, self.call.key_rope, *prompt]

    def _over(self, parts: Sequence[Tensor]) -> Forward:
        """The same forward over other tensors, in the order of `_tensors`."""
        x_BFCHW, table_VBFC, query_rope, key_rope, *prompt = parts
        pairs = tuple(zip(prompt[::2], prompt[1::2], strict=True))
        call = self.call.turned_by(query_rope, key_rope)
        return Forward(x_BFCHW, Modulations(table_VBFC), PromptKV(pairs), call)
