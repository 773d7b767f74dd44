"""Settings of ``train step_distil``; references are beside the system, ``step_distil.py``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from cascade.pipelines.spec import Stage, StageSampling
from cascade.text.encoder import TextConfig
from train.callbacks.pictures import PicturesConfig
from train.data.config import DataConfig
from train.distill.stage_teacher import TaughtPath
from train.losses.consistency import TangentConfig
from train.settings import OptimConfig, RunConfig


@dataclass(frozen=True)
class GuidanceConfig:
    """The teacher's guidance, which the student has within."""

    low: float = 1.0
    """Smallest scale that is drawn; 1 is no guidance."""
    high: float = 8.0
    """Largest; where both are the same the student is not told the scale."""
    default: float = 4.0
    """Scale that pictures are drawn with unless the user says otherwise."""

    def __post_init__(self) -> None:
        """Refuse an empty range, and a default outside."""
        if not 1 <= self.low <= self.default <= self.high:
            raise ValueError(
                f"low={self.low}, default={self.default} and high={self.high} must satisfy "
                "1 <= low <= default <= high"
            )

    @property
    def is_told(self) -> bool:
        """Whether the student is told the scale."""
        return self.low < self.high


@dataclass(frozen=True)
class AnglesConfig:
    """Which noise levels are drawn: the log of the tangent of their angle is normal."""

    mean: float = 0.0
    """Mean of ``log(tan t)``, which is ``log(sigma / alpha)`` (0.2 in SANA-Sprint at 0.5)."""
    spread: float = 1.6
    """Its standard deviation."""
    last_share: float = 0.0
    """Share that is drawn at pure noise, where sampling begins: there a discriminator judges the
    jump, but the path says nothing of it, and the consistency loss teaches nothing."""

    def __post_init__(self) -> None:
        """Refuse what is no distribution."""
        if not self.spread > 0 or not 0 <= self.last_share <= 1:
            raise ValueError(
                f"spread={self.spread} must be positive, last_share={self.last_share} in [0, 1]"
            )


@dataclass(frozen=True)
class AdversarialConfig:
    """A discriminator of latents beside the consistency loss; off unless it has a weight."""

    weight: float = 0.0
    """Of the student's adversarial loss (0.5 in SANA-Sprint); 0: there is no discriminator."""
    blocks: int = 4
    """Blocks of the teacher whose features are judged, evenly spread."""
    mean: float = 0.0
    """Mean of ``log(tan t)`` of the noise under which latents are judged."""
    spread: float = 1.0
    """Its standard deviation."""

    def __post_init__(self) -> None:
        """Refuse what judges nothing."""
        if self.weight < 0 or self.blocks < 1 or not self.spread > 0:
            raise ValueError(
                f"weight={self.weight} must not be negative, blocks={self.blocks} at least 1, "
                f"spread={self.spread} positive"
            )


@dataclass(frozen=True)
class StepsConfig:
    """What the student's file says of its sampling."""

    steps: int = 4
    """Steps unless the user says otherwise."""
    max_steps: int = 8
    """Most steps that it takes; a model's plain network takes more. Of a student by "multistep" it
    is ``steps``."""
    times: tuple[float, ...] = ()
    """Decreasing times in [0, 1], one more than steps; empty: equally spaced."""


@dataclass(frozen=True)
class StepDistilRun:
    """The distillation of a stage's guidance, or of its steps, into a student of its own shape."""

    run: RunConfig
    data: DataConfig
    stage: Stage
    """Which stage."""
    teacher: str
    """A trained stage of v3: a file or folder in any layout, a model, or a hub id."""
    text: str
    """Text encoder's folder, or a model with one; a cache must come from it."""
    compressor: str
    """Semantic compressor's file, or a model with one; a cache must come from it."""
    stage_a: str | None = None
    """Stage A's file, or a model with one, for Stage B's latents."""
    stage_a_scale: float | None = None
    """What Stage A's latents are divided by, where its file does not say it."""
    text_states: TextConfig = field(default_factory=TextConfig)
    """Which hidden states the teacher reads."""
    objective: Literal["consistency", "multistep", "guidance"] = "consistency"
    """"consistency": the end of the teacher's guided path, from anywhere on it, for any few steps.
    "multistep": the teacher's guided path from noise is walked in small steps, and the student
    learns where each of sampling's steps leads, for ``sampling.steps`` alone; pictures are not
    looked at. "guidance": what the teacher says under guidance, in one pass; the student keeps its
    steps."""
    small_steps: int = 4
    """"multistep": how many of the teacher's are one of the student's."""
    init_from: str | None = None
    """What the student starts from instead of its teacher: an earlier student's weights."""
    taught: TaughtPath | None = None
    """What the teacher predicts, where neither its file nor its model says it."""
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format in which the teacher runs."""
    time_unit: float = 1e-3
    """Unit of the student's time. Of the published embedding, 1, the slope in time is noise: see
    ``train/distill/few_steps_student.py``."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    angles: AnglesConfig = field(default_factory=AnglesConfig)
    tangent: TangentConfig = field(default_factory=TangentConfig)
    adaptive_weight: bool = False
    """Learn the weight of each noise level beside the student."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    sampling: StepsConfig = field(default_factory=StepsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    pictures: PicturesConfig | None = None
    """Pictures of fixed prompts while it learns; null draws none."""

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.stage == "stage_b" and self.stage_a is None:
            raise ValueError("stage is stage_b but stage_a is missing: name Stage A's file")
        if self.stage == "stage_c" and self.stage_a is not None:
            raise ValueError("stage is stage_c, which knows no stage_a; leave it out")
        if self.adversarial.weight > 0 and self.objective != "consistency":
            raise ValueError(
                f"adversarial.weight is {self.adversarial.weight} but objective is "
                f"{self.objective}: only jumps to clean latents, those of consistency, are judged"
            )
        if self.objective != "consistency" and self.tangent != TangentConfig():
            raise ValueError(
                f"tangent is given but objective is {self.objective}; only consistency has one"
            )
        if self.objective == "multistep" and self.angles != AnglesConfig():
            raise ValueError(
                "angles is given but objective is multistep, which learns at the starts of "
                "sampling's steps alone; give sampling.times"
            )
        times = self.sampling.times
        if self.objective == "multistep" and times and (times[0] != 1 or times[-1] != 0):
            raise ValueError(
                f"sampling.times is {times}: the walk of a multistep student goes from 1 to 0"
            )
        if self.run.strategy == "fsdp" and self.objective == "consistency":
            raise ValueError(
                "run.strategy is fsdp: the student's derivative is taken of whole weights; use ddp"
            )
        if self.small_steps < 1:
            raise ValueError(f"small_steps is {self.small_steps}; it must be at least 1")
        if not 0 < self.time_unit <= 1:
            raise ValueError(f"time_unit is {self.time_unit}; it lies in (0, 1]")
        self.sampled(StageSampling())

    def sampled(self, sampling: StageSampling, path: TaughtPath | None = None) -> StageSampling:
        """Return how the student is sampled; ``path`` is its teacher's."""
        guidance = self.guidance
        if path is not None:
            sampling = replace(sampling, **vars(path))
        sampling = replace(
            sampling,
            guidance=guidance.default,
            rescale=0.0,
            guidance_range=(guidance.low, guidance.high),
        )
        if self.objective == "guidance":
            return sampling
        steps = self.sampling
        multistep = self.objective == "multistep"
        return replace(
            sampling,
            sampler="ddim" if multistep else "lcm",
            steps=steps.steps,
            max_steps=steps.steps if multistep else steps.max_steps,
            times=steps.times,
        )
