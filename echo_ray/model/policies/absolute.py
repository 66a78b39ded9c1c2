"""The plain causal policy: every frame keeps its absolute index (spec section 5, `absolute`)."""

from __future__ import annotations

from dataclasses import dataclass

from echo_ray.model.policies.policy import CallFrames, Layout, span


@dataclass(frozen=True, slots=True)
class AbsolutePolicy:
    """Keys are rotated once and for ever, so evicted keys reach the encoder rotated."""

    evicts_rotated_keys: bool = True
    memory_in_bulk: bool = True

    def layout(self, call: CallFrames, memory_frames: int) -> Layout:
        end = call.first + call.count
        memory_start = max(0, end - len(call.local_slots) - memory_frames)
        return Layout(
            sink=call.sink_slots,
            memory=span(memory_start, memory_frames),
            local=call.local_slots,
            query=span(call.first, call.count),
        )

    def memory_fits(self, call: CallFrames, memory_frames: int) -> bool:
        """Always: the published class lets early memory positions overlap the sink's."""
        return True
