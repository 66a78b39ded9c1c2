"""The endless mode without memory: a slot's number is its position (spec section 5, `window`)."""

from __future__ import annotations

from dataclasses import dataclass

from echo_ray.model.policies.policy import CallFrames, Layout, span


@dataclass(frozen=True, slots=True)
class WindowPolicy:
    """Queries stand at their own slots, the last of the window; there is no memory tier."""

    evicts_rotated_keys: bool = False
    memory_in_bulk: bool = False

    def layout(self, call: CallFrames, memory_frames: int) -> Layout:
        held = len(call.slots)
        sink = len(call.sink_slots)
        return Layout(
            sink=span(0, sink),
            memory=(),
            local=span(sink, held - sink),
            query=span(held - call.count, call.count),
        )

    def memory_fits(self, call: CallFrames, memory_frames: int) -> bool:
        return True
