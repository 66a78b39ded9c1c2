"""From a loss to changed weights, and the average of the weights over time."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from echo_ray.training.group import all_reduce_gradients
from echo_ray.training.recipe import EmaSection, OptimizerSection
from echo_ray.training.video_model import VideoModel

MEMORY = "memory."
OUTER = ("words", "positions", "head.", "modulation", "patch_embedding")
"""Parameters next to the data or that are no map between hidden layers: never Muon's."""


class Updater:
    """The optimisers of one model, and how its gradients are treated."""

    def __init__(self, model: nn.Module, section: OptimizerSection) -> None:
        self.section = section
        self.named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in self.named]
        matrices, rest = split_parameters(self.named)
        self.optimizers: list[torch.optim.Optimizer] = []
        if section.kind == "muon" and matrices:
            self.optimizers.append(
                torch.optim.Muon(
                    self._groups(matrices, section.muon_lr),
                    lr=section.muon_lr,
                    weight_decay=section.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
            decay = 0.0
        else:
            rest, decay = self.named, section.weight_decay
        self.optimizers.append(
            torch.optim.AdamW(
                self._groups(rest, section.lr),
                lr=section.lr,
                betas=section.betas,
                weight_decay=decay,
            )
        )

    def step(self, loss: Tensor) -> None:
        """Follow the gradient of `loss` once."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        all_reduce_gradients(self.parameters)
        if self.section.clip:
            nn.utils.clip_grad_norm_(
                [p for n, p in self.named if self.section.clip_memory or not n.startswith(MEMORY)],
                self.section.clip,
            )
        for optimizer in self.optimizers:
            optimizer.step()

    def _groups(self, named: Sequence[tuple[str, nn.Parameter]], lr: float) -> list[dict[str, Any]]:
        """The memory encoder's parameters apart, if there are any, for they may learn faster."""
        memory = [p for n, p in named if n.startswith(MEMORY)]
        others = [p for n, p in named if not n.startswith(MEMORY)]
        groups = ((others, lr), (memory, lr * self.section.memory_lr_scale))
        return [{"params": part, "lr": rate} for part, rate in groups if part]


class Average:
    """A copy of a model that follows it slowly."""

    def __init__(self, model: VideoModel, section: EmaSection) -> None:
        self.section = section
        self.model = copy.deepcopy(model).requires_grad_(requires_grad=False)
        self.steps = 0

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Take in the weights after one more step."""
        self.steps += 1
        count = self.steps - self.section.start
        # Until enough steps are behind it, the average forgets its beginning quickly.
        decay = min(self.section.decay, count / (count + 10)) if count > 0 else 0.0
        torch._foreach_lerp_(
            list(self.model.parameters()), [p.detach() for p in model.parameters()], 1 - decay
        )

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "steps": self.steps}

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.steps = state["steps"]


Named = list[tuple[str, nn.Parameter]]


def split_parameters(named: Iterable[tuple[str, nn.Parameter]]) -> tuple[Named, Named]:
    """Matrices between hidden layers, and everything else: embeddings, norms, biases, heads."""
    matrices: Named = []
    rest: Named = []
    for name, parameter in named:
        inner = parameter.ndim == 2 and not any(part in name for part in OUTER)
        (matrices if inner else rest).append((name, parameter))
    return matrices, rest
