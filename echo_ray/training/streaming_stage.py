"""Stage `streaming`: long streams, their state carried from clip to clip as in a served session.

A step makes the next clip of every stream in the batch and learns from its new chunks. Window and
memory go on into the next step, cut off from what made them; the chunks that a clip shares with
the one before are only looked at. All streams of a batch begin and end together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from echo_ray.config import require
from echo_ray.preset import Preset
from echo_ray.training.bank import take
from echo_ray.training.loop import StepRandom
from echo_ray.training.recipe import StreamingRecipe
from echo_ray.training.rollout import Rollout
from echo_ray.training.self_stage import Rolled, SelfStage
from echo_ray.training.video_stage import Materials


class StreamingStage(SelfStage):
    """One long stream a row; the bank's clips are as long as a stream becomes."""

    name = "streaming"

    def __init__(self, preset: Preset, recipe: StreamingRecipe, materials: Materials) -> None:
        super().__init__(preset, recipe, materials)
        self.streaming = section = recipe.streaming
        self.stream_chunks = self.bank.ids_SKL.shape[1]
        fits = section.clip_chunks <= self.stream_chunks
        rule = f"at most clips.chunks ({self.stream_chunks})"
        require(fits, "streaming.clip_chunks", section.clip_chunks, rule)
        local = preset.cache.local_frames // self.frames
        fits = section.overlap_chunks <= local
        rule = f"at most the {local} chunks of the local window"
        require(fits, "streaming.overlap_chunks", section.overlap_chunks, rule)
        self.rollout: Rollout | None = None
        self.picked = torch.zeros(0, dtype=torch.int64)

    def train_step(self, random: StepRandom, progress: float) -> dict[str, float]:
        with self.autocast(), torch.set_grad_enabled(self.learns(random)):
            rolled = [self._next_clip(random) for _ in range(self.streaming.bptt_clips)]
        losses = self.learn(rolled, random)
        if self.rollout is not None:
            self.rollout.detach()
        return losses

    def _next_clip(self, random: StepRandom) -> Rolled:
        rollout = self._stream(random)
        start = rollout.next_chunk
        overlap = self.streaming.overlap_chunks if start else 0
        stop = start + self.streaming.clip_chunks - overlap
        new = take(self.bank, self.picked, range(start, stop), self.frames, self.device)
        before = rollout.history[:, rollout.history.shape[1] - overlap * self.frames :]
        rolled = self.roll(rollout, new, random)
        if not overlap:
            return rolled
        ids = self.bank.ids_SKL[self.picked, start - overlap : stop].to(self.device).long()
        latents = torch.cat([before, rolled.latents_BFCHW], dim=1)
        return Rolled(latents, ids, rolled.fresh, rolled.loss)

    def _stream(self, random: StepRandom) -> Rollout:
        """The streams under way, or new ones if these have no room for another clip."""
        new = self.streaming.clip_chunks - self.streaming.overlap_chunks
        if self.rollout is None or self.rollout.next_chunk + new > self.stream_chunks:
            batch = self.section.batch
            count = len(self.bank.ids_SKL)
            self.picked = torch.from_numpy(random.data.integers(count, size=batch))
            self.rollout = self.new_rollout(batch, random)
        return self.rollout

    def state(self) -> dict[str, Any]:
        rollout = self.rollout
        stream: dict[str, Tensor | Any] | None = None
        if rollout is not None:
            stream = {
                "picked": self.picked,
                "rollout": rollout.state(),
                "see_memory": rollout.cache.encoder is not None,
            }
        return super().state() | {"stream": stream}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        stream = state["stream"]
        self.rollout = None
        if stream is None:
            return
        self.picked = stream["picked"]
        self.rollout = Rollout(
            self.preset, self.model, len(self.picked), self.device,
            block=self.block,
            see_memory=stream["see_memory"],
            context_gradient=self.section.context_gradient,
        )  # fmt: skip
        self.rollout.restore(stream["rollout"])
