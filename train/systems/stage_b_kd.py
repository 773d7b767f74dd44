"""A smaller Stage B that learns from a larger one: its outputs, and features of its blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from cascade.checkpoints.found import FoundNetwork
from cascade.checkpoints.load import build
from cascade.checkpoints.part_files import find_network
from stages.block_features import BlockOutput
from stages.semantic_compressor import CompressorConfig
from stages.stage_b import StageB, StageBCondition, StageBConfig
from stages.stage_b_v2 import StageBV2Condition
from train.callbacks.find import find_callback
from train.callbacks.ledger import Ledger
from train.clock import PhaseClock
from train.distill.teacher import TeacherDtype
from train.losses.cascade_distillation import FeatureProjector, FeatureProjectors, on_grid
from train.losses.denoising import Noised
from train.losses.distillation import output_loss
from train.reduction import log_means
from train.systems.stage_b import StageBRun, StageBSystem


@dataclass(frozen=True)
class StageBTeacherConfig:
    """A larger Stage B, and what of it is imitated."""

    network: str
    """Its weights: a file or folder in any layout, a model, or a hub id."""
    dtype: TeacherDtype = "bfloat16"
    """Number format in which it is kept and runs."""
    init: bool = True
    """Begin with every n-th of its blocks, where shapes fit; ``init_from`` goes before."""
    task_weight: float = 1.0
    """Of the denoising loss."""
    output_weight: float = 0.0
    """Of the distance to its output; 0: off."""
    feature_weight: float = 0.0
    """Of the mean of the distances to its blocks' outputs, each over the mean square of what the
    teacher has there; 0: off."""
    blocks: dict[str, str] = field(default_factory=dict)
    """Blocks of the student -> blocks of the teacher that they imitate; none: the last block of
    every level on both ways. Where widths differ, a projection is learnt, and not kept."""
    hidden_channels: int = 256
    """Width of the hidden layer of such projections."""

    def __post_init__(self) -> None:
        """Refuse weights that teach nothing."""
        weights = (self.task_weight, self.output_weight, self.feature_weight)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(
                f"task_weight, output_weight and feature_weight are {weights}; none may be "
                "negative, and one must be positive"
            )
        if self.hidden_channels < 1:
            raise ValueError(f"hidden_channels is {self.hidden_channels}; at least 1")


@dataclass(frozen=True)
class StageBKDRun(StageBRun):
    """The training of a Stage B with a larger one as its teacher."""

    teacher: StageBTeacherConfig | None = None
    """The larger Stage B."""

    def __post_init__(self) -> None:
        """Refuse what has no teacher, or sees other latents than it."""
        super().__post_init__()
        if self.teacher is None:
            raise ValueError("teacher is missing: name the larger Stage B")
        if self.model_v2 is not None:
            raise ValueError("model_v2 is set: only Stage B of v3 has a teacher")
        if self.compressor is not None:
            raise ValueError(
                "compressor is trained: the teacher knows the latents of a finished one alone; "
                "name it as frozen_compressor"
            )

    @property
    def taught_by(self) -> StageBTeacherConfig:
        """The teacher's section."""
        assert self.teacher is not None, "__post_init__ requires it"
        return self.teacher


class FrozenStageB:
    """The larger Stage B, frozen and in evaluation mode, outside of any system."""

    def __init__(self, name: str, dtype: TeacherDtype) -> None:
        """Find the weights; only headers are read.

        Raises:
            UserError: They are not there, or are another network's.
        """
        self.name = name
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.found: FoundNetwork = find_network(name, "stage_b")
        self.clock = PhaseClock()
        """The run's."""
        self._network: StageB | None = None

    @property
    def config(self) -> StageBConfig:
        """Its sizes."""
        return cast(StageBConfig, self.found.published.config)

    def load(self, device: torch.device) -> None:
        """Load the weights onto a device."""
        network = build(self.found.opened, self.found.published, device=device, dtype=self.dtype)
        self._network = cast(StageB, network.eval().requires_grad_(False))

    @torch.no_grad()
    def __call__(
        self, x_t: Tensor, time: Tensor, cond: StageBCondition, blocks: list[str]
    ) -> BlockOutput:
        """Return what it says, under no autocast; arguments as of ``StageB.forward``."""
        assert self._network is not None, "load() comes first"
        with (
            self.clock.within("teacher", x_t.device),
            torch.autocast(x_t.device.type, enabled=False),
        ):
            return self._network(x_t.to(self.dtype), time, cond, features=blocks)


class LoadStageBTeacher(Callback):
    """Loads the teacher where the run trains, and gives it the run's clock."""

    def __init__(self, teacher: FrozenStageB) -> None:
        """Take the teacher."""
        self.teacher = teacher

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load it."""
        self.teacher.load(pl_module.device)
        ledger = find_callback(trainer, Ledger)
        if ledger is not None:
            self.teacher.clock = ledger.clock


def last_blocks(config: StageBConfig) -> tuple[str, ...]:
    """Return the last block of every level, on the way down and up."""
    ways = {"down_blocks": config.down_blocks, "up_blocks": config.up_blocks}
    return tuple(
        f"{way}.{level}.{count - 1}"
        for way, counts in ways.items()
        for level, count in enumerate(counts)
        if count
    )


def block_pairs(
    given: dict[str, str], student: StageBConfig, teacher: StageBConfig
) -> tuple[tuple[str, str], ...]:
    """Return the student's blocks with the teacher's that they imitate.

    Raises:
        ValueError: A name is no block, or the two have other numbers of levels.
    """
    for which, names, known in (
        ("student", given.keys(), student.sites),
        ("teacher", given.values(), teacher.sites),
    ):
        for name in names:
            if name not in known:
                raise ValueError(f"{name!r} is no block of the {which}")
    if given:
        return tuple(given.items())
    ours, theirs = last_blocks(student), last_blocks(teacher)
    if len(ours) != len(theirs):
        raise ValueError("the two have other numbers of levels; name the pairs")
    return tuple(zip(ours, theirs, strict=True))


class StageBKDSystem(StageBSystem):
    """Stage B's own training with the terms of a teacher beside its loss."""

    config: StageBKDRun

    def __init__(
        self,
        config: StageBKDRun,
        null_text: tuple[Tensor, Tensor],
        teacher: FrozenStageB,
        frozen_compressor: CompressorConfig | None = None,
    ) -> None:
        """Build the network, and the projections of features of other widths.

        Args:
            config: Of the run.
            null_text: See ``StageBSystem``.
            teacher: The larger Stage B.
            frozen_compressor: See ``StageBSystem``.

        Raises:
            ValueError: ``teacher.blocks`` names what is no block.
        """
        super().__init__(config, null_text, frozen_compressor)
        self.teacher = teacher
        self.pairs: tuple[tuple[str, str], ...] = ()
        self.projectors = FeatureProjectors()
        sizes, taught_by = config.sizes, config.taught_by
        assert isinstance(sizes, StageBConfig), "StageBKDRun refuses v2"
        if taught_by.feature_weight > 0:
            self.pairs = block_pairs(taught_by.blocks, sizes, teacher.config)
        for ours, theirs in self.pairs:
            widths = sizes.sites[ours].channels, teacher.config.sites[theirs].channels
            if widths[0] != widths[1]:
                projector = FeatureProjector(widths[0], taught_by.hidden_channels, widths[1])
                self.projectors[ours.replace(".", "_")] = projector

    @property
    def blocks(self) -> tuple[str, ...]:
        """Blocks whose outputs are compared."""
        return tuple(ours for ours, _ in self.pairs)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return what the optimizer steps: the network, and the projections."""
        return [*super().trained_parameters(), *self.projectors.parameters()]

    def taught(
        self,
        loss: Tensor,
        noised: Noised,
        cond: StageBCondition | StageBV2Condition,
        output: BlockOutput,
    ) -> Tensor:
        """Return the loss with the teacher's terms; each is logged by itself."""
        weights = self.config.taught_by
        assert isinstance(cond, StageBCondition), "StageBKDRun refuses v2"
        terms = {"task": weights.task_weight * loss}
        if weights.output_weight > 0 or self.pairs:
            wanted = [theirs for _, theirs in self.pairs]
            said = self.teacher(noised.x_t, noised.network_time, cond, wanted)
            if weights.output_weight > 0:
                distance = output_loss(output.prediction, said.prediction, noised.weight)
                terms["kd_output"] = weights.output_weight * distance
            if self.pairs:
                terms["kd_features"] = weights.feature_weight * self._features(output, said)
        log_means(self, terms)
        return torch.stack(list(terms.values())).sum()

    def _features(self, output: BlockOutput, said: BlockOutput) -> Tensor:
        """Return the mean over blocks of the relative squared distances."""
        distances = []
        for ours, theirs in self.pairs:
            student, teacher = output.features[ours], said.features[theirs].float()
            name = ours.replace(".", "_")
            if name in self.projectors:
                student = self.projectors[name](student)
            student = on_grid(student, (teacher.shape[-2], teacher.shape[-1]))
            error = (student - teacher).square().flatten(1).mean(dim=1)  # (B,)
            size = teacher.square().flatten(1).mean(dim=1)
            distances.append((error / size.clamp(min=1e-12)).mean())
        return torch.stack(distances).mean()
