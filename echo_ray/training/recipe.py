"""The recipe as data: one strictly read section for each thing that a stage can be told.

A recipe is the content of one file under `configs/`. What all stages share has the same name in
all of them; what belongs to one stage is in the section of its name.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from echo_ray.config import require
from echo_ray.preset import CacheShape

STAGES = ("codec", "teacher", "pretrain", "fewstep", "streaming")
"""In the order in which each can begin from those before it."""
SHORTEST_SCENE = 5
"""Chunks of the shortest scene in a clip of several."""
OBJECTIVES = ("regression", "dmd")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSection:
    """How long, where, and from which seed."""

    steps: int
    minutes: float | None = None
    """Ends the stage after so many minutes of its own work instead, and decides the schedule."""
    seed: int = 7
    device: str = "cpu"
    threads: int = 1
    bf16: bool = True
    """Products in bfloat16; weights, sums and optimiser stay in float32."""
    compile: bool = False
    """Needs a C++ compiler on a CPU; slow for the first minutes, then faster."""
    checkpoint_every_s: float = 300.0
    sheet_chunks: int = 10
    """Length of the samples drawn at every checkpoint; 0 draws none."""
    folder: str | None = None
    """Below --out. None: the stage's name."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, "run.steps", self.steps, "at least 1")
        timed = self.minutes is None or self.minutes > 0
        require(timed, "run.minutes", self.minutes, "more than 0")
        require(self.seed >= 0, "run.seed", self.seed, "0 or more")
        require(self.device in ("cpu", "cuda"), "run.device", self.device, "cpu or cuda")
        require(1 <= self.threads <= 256, "run.threads", self.threads, "1 to 256")
        require(self.sheet_chunks >= 0, "run.sheet_chunks", self.sheet_chunks, "0 or more")
        plain = self.folder is None or self.folder.replace("_", "").isalnum()
        require(plain, "run.folder", self.folder, "letters, digits and underscores")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSection:
    """One optimiser for everything, or Muon for the matrices between hidden layers."""

    kind: str = "adamw"
    lr: float = 1e-3
    """Of AdamW."""
    muon_lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest norm of all gradients together; 0: they are not clipped."""
    clip_memory: bool = True
    """False: the memory encoder's gradients are left as they are, as published."""
    memory_lr_scale: float = 1.0
    schedule: str = "cosine"
    """cosine: rise, stay, fall from the middle on. constant: after the rise nothing changes."""

    def __post_init__(self) -> None:
        require(self.kind in ("adamw", "muon"), "optimizer.kind", self.kind, "adamw or muon")
        for name in ("lr", "muon_lr", "memory_lr_scale"):
            value = getattr(self, name)
            require(value > 0, f"optimizer.{name}", value, "more than 0")
        fits = all(0 <= b < 1 for b in self.betas)
        require(fits, "optimizer.betas", self.betas, "each from 0 to less than 1")
        require(self.clip >= 0, "optimizer.clip", self.clip, "0 or more")
        known = self.schedule in ("cosine", "constant")
        require(known, "optimizer.schedule", self.schedule, "cosine or constant")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaSection:
    """The average of the weights that is written, sampled from and served."""

    decay: float = 0.995
    """0: no average, the weights themselves."""
    start: int = 0
    """The average is the weights themselves up to this step."""

    def __post_init__(self) -> None:
        require(0 <= self.decay < 1, "ema.decay", self.decay, "from 0 to less than 1")
        require(self.start >= 0, "ema.start", self.start, "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSection:
    """Train low-rank changes of the linear layers in the blocks, and the memory encoder whole."""

    rank: int = 256
    alpha: float | None = None
    """None: the rank, so that the change is B A as it is."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        fits = self.alpha is None or self.alpha > 0
        require(fits, "lora.alpha", self.alpha, "more than 0")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipsSection:
    """The bank of clips: rendered and encoded once, then drawn from."""

    count: int = 2400
    chunks: int = 10
    """Chunks a clip: enough to reach the cache's stationary regime."""
    seed: int = 7
    scene_chunks: int | None = None
    """Most chunks of one scene: a longer clip is several scenes, cut one after the other, as a
    stream whose prompts change. None: every clip is one scene."""
    hide_share: float | None = None
    """Share of clips whose object hides and comes back: what a memory is learned from. None: as
    in the world, about one in five."""
    two_objects: float | None = None
    """Share of two objects in clips whose kind leaves it open. None: as in the world."""
    workers: int = 1
    """Processes that render and encode."""
    prompts: str | None = None
    """A file of prompts in place of clips, for distribution matching alone; see `prompts.py`."""

    def __post_init__(self) -> None:
        for name in ("count", "workers"):
            value = getattr(self, name)
            require(value >= 1, f"clips.{name}", value, "at least 1")
        require(self.chunks >= 2, "clips.chunks", self.chunks, "at least 2")
        longest = self.scene_chunks
        fits = longest is None or longest >= 2 * SHORTEST_SCENE
        rule = f"at least {2 * SHORTEST_SCENE}, or none for whole clips"
        require(fits, "clips.scene_chunks", longest, rule)
        for name in ("hide_share", "two_objects"):
            share = getattr(self, name)
            fits = share is None or 0 <= share <= 1
            require(fits, f"clips.{name}", share, "from 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecSection:
    batch: int = 16
    """Groups of frames a step."""
    noise: float = 0.12
    """Largest noise on latents, in their own spread, that the decoder learns to ignore."""
    foreground_weight: float = 5.0

    def __post_init__(self) -> None:
        require(self.batch >= 1, "codec.batch", self.batch, "at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSection:
    batch: int = 8
    chunks: int = 7
    """What it sees at once; clips longer than this are beyond it."""
    drop_caption: float = 0.1
    """Share of clips without any caption: what guidance compares with."""
    object_weight: float = 4.0

    def __post_init__(self) -> None:
        require(self.batch >= 1, "teacher.batch", self.batch, "at least 1")
        require(self.chunks >= 1, "teacher.chunks", self.chunks, "at least 1")
        fits = 0 <= self.drop_caption < 1
        require(fits, "teacher.drop_caption", self.drop_caption, "from 0 to less than 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainSection:
    batch: int = 8
    short_chunks: int = 5
    """Chunks used of a clip in the first part of the training, where prompts are learned."""
    short_share: float = 0.5
    single_object_share: float = 0.0
    """First part of the training that sees clips of at most one object only."""
    context_noise: float = 0.15
    """Largest noise on the clean latents that become keys and values; half of the clips."""
    object_weight: float = 4.0
    """How much more latents of objects count than those of the background."""
    first_chunk_weight: float = 2.0
    """How much more the first chunk counts, where objects come into being."""
    lost_objects: float = 0.25
    """Share of clips whose past has chunks where the objects are partly or wholly erased: what a
    prompt names must come back after a failure."""
    return_weight: float = 1.0
    """How much more a chunk counts that shows an object again after it has been away."""
    hide_memory: float = 0.15
    """Share of steps that must do without memory, so that every cache policy is served."""
    hide_sink: float = 0.0
    """Share of the steps without memory that must do without the sink, too."""
    rebuild_share: float = 0.3
    """Share of steps with one rebuild of the window, as at a prompt switch or a saved point."""
    fast_forward: int = 0
    """Most chunks by which the time of an empty chunk is drawn out, in memory updates alone."""

    def __post_init__(self) -> None:
        require(self.batch >= 1, "pretrain.batch", self.batch, "at least 1")
        require(self.short_chunks >= 2, "pretrain.short_chunks", self.short_chunks, "at least 2")
        positive = self.fast_forward >= 0
        require(positive, "pretrain.fast_forward", self.fast_forward, "0 or more")
        positive = self.return_weight > 0
        require(positive, "pretrain.return_weight", self.return_weight, "more than 0")
        for name in ("hide_memory", "hide_sink"):
            share = getattr(self, name)
            require(0 <= share <= 1, f"pretrain.{name}", share, "from 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutSection:
    """How the student makes its own past, and what it is measured by."""

    batch: int = 8
    objective: str = "regression"
    """regression: towards the true clip. dmd: towards a teacher's distribution."""
    own_share: float = 0.75
    """regression: share of chunks whose context is the student's own; the rest is the truth."""
    aligned_from: int = 2
    """regression: what began at an earlier sampler step is never context. From so much noise the
    student makes up what the caption leaves open, and the clip goes on otherwise: it would learn
    to believe nothing that it remembers. 0: everything may be."""
    lead_steps: int = 1
    """regression: most sampler steps of the student's own before the step that is trained."""
    context_noise: float = 0.0
    """Largest noise on the latents that become keys and values; half of the clips."""
    context_gradient: bool = False
    """True: keys and values of the context carry gradients. The published recipe's carry none."""
    hide_memory: float = 0.0
    """Share of rollouts, or whole streams, that must do without memory."""
    fast_forward: int = 0
    """Most chunks by which the time of an empty chunk is drawn out, in memory updates alone."""
    object_weight: float = 4.0
    first_chunk_weight: float = 2.0

    def __post_init__(self) -> None:
        require(self.batch >= 1, "rollout.batch", self.batch, "at least 1")
        known = self.objective in OBJECTIVES
        require(known, "rollout.objective", self.objective, " or ".join(OBJECTIVES))
        for name in ("lead_steps", "aligned_from"):
            steps = getattr(self, name)
            require(steps >= 0, f"rollout.{name}", steps, "0 or more")
        positive = self.fast_forward >= 0
        require(positive, "rollout.fast_forward", self.fast_forward, "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class DmdSection:
    """Distribution matching: a frozen teacher, and a critic that follows the student."""

    teacher: str
    """Weights folder of a `teacher` stage; `{out}` stands for the run's folder."""
    guidance: float = 0.0
    """Of the teacher: x + guidance (x - x without caption)."""
    ratio: int = 5
    """Steps of the critic for one of the student."""
    low: float = 0.02
    high: float = 0.98
    """Noise levels outside these are moved to the nearer one."""
    critic: OptimizerSection = field(default_factory=OptimizerSection)

    def __post_init__(self) -> None:
        require(self.ratio >= 1, "dmd.ratio", self.ratio, "at least 1")
        require(0 < self.low < self.high < 1, "dmd.low", self.low, "between 0 and dmd.high < 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class FewstepSection:
    chunks: int = 10
    """Length of a rollout; long enough for the memory to be used."""

    def __post_init__(self) -> None:
        require(self.chunks >= 1, "fewstep.chunks", self.chunks, "at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamingSection:
    clip_chunks: int = 7
    """Chunks that the objective looks at together."""
    overlap_chunks: int = 1
    """How many of them were made by the clip before, without gradient."""
    bptt_clips: int = 1
    """Clips through which the memory's gradient flows before the state is cut off."""

    def __post_init__(self) -> None:
        fits = 0 <= self.overlap_chunks < self.clip_chunks
        rule = f"0 to less than streaming.clip_chunks ({self.clip_chunks})"
        require(fits, "streaming.overlap_chunks", self.overlap_chunks, rule)
        require(self.bptt_clips >= 1, "streaming.bptt_clips", self.bptt_clips, "at least 1")


def _clips_only(section: ClipsSection) -> None:
    rule = "only for rollout.objective dmd; everything else learns from clips"
    require(section.prompts is None, "clips.prompts", section.prompts, rule)


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecRecipe:
    """Stage `codec`: pictures to latents and back."""

    stage: str
    run: RunSection
    preset: str = "echo-tiny"
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    codec: CodecSection = field(default_factory=CodecSection)


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoRecipe:
    """What the stages of the video model share."""

    stage: str
    run: RunSection
    init_from: str
    """Weights folder to begin from; `{out}` is the run's folder, `{preset}` the preset's."""
    fresh: tuple[str, ...] = ()
    """Parts (dit, memory, text) that begin from nothing; all others must be in that folder."""
    preset: str = "echo-tiny"
    cache: CacheShape | None = None
    """In place of the preset's; a recipe's file names only what differs."""
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    ema: EmaSection = field(default_factory=EmaSection)
    lora: LoraSection | None = None
    clips: ClipsSection = field(default_factory=ClipsSection)

    def __post_init__(self) -> None:
        known = set(self.fresh) <= {"dit", "memory", "text"}
        require(known, "fresh", self.fresh, "of dit, memory and text")


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherRecipe(VideoRecipe):
    """Stage `teacher`: a model that sees whole clips at once."""

    teacher: TeacherSection = field(default_factory=TeacherSection)

    def __post_init__(self) -> None:
        VideoRecipe.__post_init__(self)
        _clips_only(self.clips)


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainRecipe(VideoRecipe):
    """Stage `pretrain`: causal flow matching with a true past."""

    pretrain: PretrainSection = field(default_factory=PretrainSection)

    def __post_init__(self) -> None:
        VideoRecipe.__post_init__(self)
        _clips_only(self.clips)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutRecipe(VideoRecipe):
    """What the stages have in common in which the student makes its own past."""

    rollout: RolloutSection = field(default_factory=RolloutSection)
    dmd: DmdSection | None = None

    def __post_init__(self) -> None:
        VideoRecipe.__post_init__(self)
        given = (self.rollout.objective == "dmd") == (self.dmd is not None)
        rule = "a section [dmd] if, and only if, rollout.objective is dmd"
        require(given, "dmd", self.dmd, rule)
        if self.dmd is None:
            _clips_only(self.clips)


@dataclass(frozen=True, kw_only=True, slots=True)
class FewstepRecipe(RolloutRecipe):
    """Stage `fewstep`: one rollout a sample, from its first chunk."""

    fewstep: FewstepSection = field(default_factory=FewstepSection)


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamingRecipe(RolloutRecipe):
    """Stage `streaming`: long streams, their state carried from clip to clip."""

    streaming: StreamingSection = field(default_factory=StreamingSection)


Recipe = CodecRecipe | TeacherRecipe | PretrainRecipe | FewstepRecipe | StreamingRecipe
