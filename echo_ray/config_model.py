"""The section of the configuration that says which model runs, on what, and how it computes."""

from __future__ import annotations

from dataclasses import dataclass

from echo_ray.config_rules import require

ATTENTIONS = ("auto", "fa3", "fa2", "cudnn", "flash", "plain")
"""FlashAttention 3 and 2, and PyTorch's own: cuDNN's, its flash kernel, and plain products."""
PRECISIONS = ("exact", "fp8", "fp8+attention8")
"""The preset's own numbers; linear layers of blocks in 8 bits; their self-attention, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """Which model runs, and on what."""

    preset: str = "echo-tiny"
    device: str = "cpu"
    threads: int = 1
    """CPU threads of the engine. More than one changes bits, so it is part of the fingerprint."""
    weights: str | None = None
    """Folder that `echo-ray weights convert` wrote; None: the weights inside the preset."""
    vae: str | None = None
    """`wan` or `tiny` for presets that have both; None: the preset's own codec."""
    text_device: str | None = None
    """Where prompts are encoded, if not on `device`."""
    keep_text_encoder: bool = True
    """False: load it for every new prompt and let go of it after, when memory is short."""
    prompts_kept: int = 64
    """Encoded prompts held for the next session or switch that asks for the same one."""
    attention: str = "auto"
    """One of `ATTENTIONS`; `auto` takes the best that the device has. Part of the fingerprint."""
    precision: str = "exact"
    """One of `PRECISIONS`. What is not `exact` rounds more; named in the fingerprint."""
    graphs: bool = True
    """Replay forwards and decodings as CUDA graphs; False runs each operation anew, as on a CPU."""

    def __post_init__(self) -> None:
        require(bool(self.preset), "model.preset", self.preset, "name a preset")
        require(self.device in ("cpu", "cuda"), "model.device", self.device, "cpu or cuda")
        require(1 <= self.threads <= 256, "model.threads", self.threads, "1 to 256")
        known = self.text_device in (None, "cpu", "cuda")
        require(known, "model.text_device", self.text_device, "cpu or cuda")
        require(
            1 <= self.prompts_kept <= 4096, "model.prompts_kept", self.prompts_kept, "1 to 4096"
        )
        require(self.attention in ATTENTIONS, "model.attention", self.attention, _any(ATTENTIONS))
        known = self.precision in PRECISIONS
        require(known, "model.precision", self.precision, _any(PRECISIONS))


def _any(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
