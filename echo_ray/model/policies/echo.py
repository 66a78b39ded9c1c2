"""Echo-Infinity's mature policy: bounded relative positions (paper section 3, spec section 5)."""

from __future__ import annotations

from dataclasses import dataclass

from echo_ray.model.policies.policy import CallFrames, Layout, span


@dataclass(frozen=True, slots=True)
class EchoPolicy:
    """Positions never exceed `position_limit` - 1; memory stands directly before the local tier."""

    position_limit: int
    evicts_rotated_keys: bool = False
    memory_in_bulk: bool = False

    def layout(self, call: CallFrames, memory_frames: int) -> Layout:
        held = len(call.local_slots)
        sink = span(0, len(call.sink_slots))
        # While nothing but the sink is held, the call's frames are the sink.
        last = min(call.first + call.count, self.position_limit) - 1 if held else len(sink) - 1
        local_start = last - held + 1
        return Layout(
            sink=sink,
            memory=span(local_start - memory_frames, memory_frames),
            local=span(local_start, held),
            query=span(last - call.count + 1, call.count),
        )

    def memory_fits(self, call: CallFrames, memory_frames: int) -> bool:
        memory = self.layout(call, memory_frames).memory
        return not memory or memory[0] >= len(call.sink_slots)
