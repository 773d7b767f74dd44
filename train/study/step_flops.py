"""What one sample of a training takes, counted before anything is trained, downloaded or in memory.

The step is the system's own ``training_step`` and its backward pass, run on tensors without
content: what a run's ledger counts of its first step is what is counted here, but for attention:
fused kernels compute its scores again on the way back, a product in seven more. Sizes come from the
run's configuration, from weights that are here, from earlier steps of the arm, or, of published
weights, from :mod:`train.study.published_sizes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cascade.checkpoints.files import on_meta
from cascade.evaluate.flops import FlopCounter
from stages.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from stages.semantic_compressor import CompressorConfig, SemanticCompressor
from stages.stage_a import StageA, StageAConfig
from stages.stage_c import StageCConfig
from stages.unet.config import UNetConfig
from train.data.cached import CachedBatch
from train.losses.distillation import site_pairs
from train.meta_step import step_on_meta
from train.optim import make_optimizer
from train.study.known_sizes import Known, picture_tower, run_of
from train.study.settings import ArmConfig, StepConfig
from train.study.teacher_flops import TeacherOnMeta, count_picture_teacher
from train.systems.cascade_kd import CascadeKDRun, CascadeKDSystem
from train.systems.stage_a import StageARun, StageASystem
from train.systems.stage_b import StageBRun, StageBSystem
from train.systems.stage_c import StageCRun, StageCSystem
from train.systems.unet import Lesson, UNetRun, UNetSystem

_BATCH = 2
_LATE = 10**8
"""A step at which all terms of a loss are in force."""


@dataclass(frozen=True)
class StepFlops:
    """Operations of one sample; two for a multiply-accumulate."""

    parameters: int
    """That learn."""
    learning: float
    """Forward and backward of what learns, with its losses, and its part of the optimizer's step:
    Muon multiplies matrices. What the ledger counts, less the teacher's."""
    teacher: float
    """The teacher's forward pass in the step."""
    encoders: float
    """Of the frozen networks, where the step runs them: with no cache in ``data.folder``, on shards
    of pictures. The ledger has their seconds and not their operations."""

    @property
    def total(self) -> float:
        """All that the device does."""
        return self.learning + self.teacher + self.encoders


def count_step(step: StepConfig, arm: ArmConfig, image_size: int) -> StepFlops:
    """Count a training's step.

    Args:
        step: The training.
        arm: Whose earlier steps say the sizes of what they make.
        image_size: Side of the pictures in pixels, where the run takes them as they are.

    Raises:
        UserError: A size is not known.
    """
    config = run_of(step)
    known = Known(arm)
    side = config.data.size or image_size
    if isinstance(config, StageARun):
        return _count_stage_a(config)
    if isinstance(config, StageBRun):
        return _count_stage_b(config, known, side)
    if isinstance(config, StageCRun):
        return _count_stage_c(config, known, side)
    return _count_unet(config, known, side)


def _counted(system: Any, batch: CachedBatch) -> float:
    """Return the operations of a step for each sample: forward, backward and the optimizer's."""
    config = system.config
    if config.run.activation_checkpointing:
        system.network.recompute = True
    samples = config.data.batch_size * config.run.accumulate
    return step_on_meta(system, batch, _LATE) / _BATCH + _optimizer_flops(system) / samples


def _optimizer_flops(system: Any) -> float:
    """Return the operations of one step of a system's optimizer; AdamW's has no products."""
    if system.config.optim.name != "muon":
        return 0.0
    parameters = [one for one in system.parameters() if one.requires_grad]
    optimizer, _ = make_optimizer(parameters, system.config.optim, system.config.run.max_steps)
    with FlopCounter() as counter:
        optimizer.step()
    return counter.total


def _encoder_flops(network: Any, run: Any) -> float:
    """Return the operations of a frozen network on one picture."""
    network.eval().requires_grad_(False)
    with torch.no_grad(), FlopCounter() as counter:
        run(network)
    return counter.total


def _pixels(side: int, batch: int = 1) -> Tensor:
    return torch.empty(batch, 3, side, side, device="meta")


def _empty(*shape: int) -> Tensor:
    return torch.empty(_BATCH, *shape, device="meta")


def _batch(**parts: Tensor) -> CachedBatch:
    batch = CachedBatch([""] * _BATCH, torch.zeros(_BATCH))
    for name, tensor in parts.items():
        setattr(batch, name, tensor)
    return batch


def _learning(*networks: torch.nn.Module) -> int:
    return sum(p.numel() for one in networks for p in one.parameters() if p.requires_grad)


def _null(tokens: int, channels: int, pooled: int) -> tuple[Tensor, Tensor]:
    return torch.empty(tokens, channels, device="meta"), torch.empty(pooled, device="meta")


def _stage_a_shape(sizes: StageAConfig, side: int) -> tuple[int, int, int]:
    return sizes.latent_channels, side // sizes.downscale, side // sizes.downscale


def _count_stage_a(config: StageARun) -> StepFlops:
    perceptual = 0.0
    if config.clip is not None and config.loss.perceptual > 0:
        one, _, layers = picture_tower(config.clip, config.crop)
        # Both pictures forward; back to the pixels from the deepest layer that is compared.
        perceptual = one * (2 + max(config.loss.perceptual_layers) / layers)
    sizes = config.sizes
    cells = (config.crop // sizes.downscale) ** 2
    nearest = 2.0 * cells * sizes.codebook_size * sizes.latent_channels * config.quantize
    bare = replace(config, clip=None, loss=replace(config.loss, perceptual=0.0), quantize=0.0)
    with on_meta():
        system = StageASystem(bare)
    learning = _counted(system, _batch(pixels=_empty(3, config.crop, config.crop)))
    parameters = _learning(system.network, system.discriminator)
    return StepFlops(parameters, learning + perceptual + nearest, 0.0, 0.0)


def _count_stage_b(config: StageBRun, known: Known, side: int) -> StepFlops:
    config = known.whole(config)
    stage_a: StageAConfig = known.sizes(config.stage_a, "stage_a")
    caption, tokens, channels, pooled = known.text(
        config.text, getattr(config.sizes, "text_channels", None)
    )
    frozen: CompressorConfig | None = None
    encoders = caption
    if config.frozen_compressor is not None:
        frozen = known.sizes(config.frozen_compressor, "compressor")
    with on_meta():
        system = StageBSystem(config, _null(tokens, channels, pooled), frozen)
        encoder = StageA(stage_a)
        compressor = None if frozen is None else SemanticCompressor(frozen)
    encoders += _encoder_flops(encoder, lambda network: network.encode(_pixels(side)))
    parts = {
        "stage_a_latents": _empty(*_stage_a_shape(stage_a, side)),
        "text_hidden": _empty(tokens, channels),
        "text_pooled": _empty(pooled),
    }
    if frozen is not None and compressor is not None:
        parts["stage_c_latents"] = _empty(frozen.latent_channels, *frozen.latent_size((side, side)))
        encoders += _encoder_flops(compressor, lambda network: network.encode(_pixels(side)))
    else:
        parts["pixels"] = _empty(3, side, side)
    learning = _counted(system, _batch(**parts))
    parameters = sum(p.numel() for p in system.trained_parameters())
    return StepFlops(parameters, learning, 0.0, 0.0 if config.data.folder else encoders)


def _count_stage_c(config: StageCRun, known: Known, side: int) -> StepFlops:
    config = known.whole(config)
    sizes = config.sizes
    caption, tokens, channels, pooled = known.text(config.text, sizes.text_channels)
    made = known.compressor(config.compressor)
    with on_meta():
        encoder: Any = (
            AutoencoderKL(made)
            if isinstance(made, AutoencoderKLConfig)
            else SemanticCompressor(made)
        )
    encoders = caption + _encoder_flops(encoder, lambda network: network.encode(_pixels(side)))
    if isinstance(made, AutoencoderKLConfig):
        shape = (made.latent_channels, side // made.downscale, side // made.downscale)
    else:
        shape = (made.latent_channels, *made.latent_size((side, side)))
    parts = {
        "stage_c_latents": _empty(*shape),
        "text_hidden": _empty(tokens, channels),
        "text_pooled": _empty(pooled),
    }
    if config.image_share > 0 and isinstance(sizes, StageCConfig):
        picture, projection, _ = picture_tower(config.image or config.text)
        parts["image_embeds"] = _empty(projection)
        encoders += picture
    null, teacher = _null(tokens, channels, pooled), 0.0
    if isinstance(config, CascadeKDRun):
        taught = count_picture_teacher(config, known, side, tokens)
        teacher, encoders = taught.step, encoders + taught.encoders
        width = None if taught.features is None else taught.features[0]
        if taught.features is not None:
            parts["teacher_features"] = _empty(*taught.features)
        # What the student adds of its own is the projection; products of affinities are few.
        with on_meta():
            system: StageCSystem = CascadeKDSystem(_projecting(config), null, None, width)
    else:
        with on_meta():
            system = StageCSystem(config, null)
    learning = _counted(system, _batch(**parts))
    parameters = sum(one.numel() for one in system.trained_parameters())
    return StepFlops(parameters, learning, teacher, 0.0 if config.data.folder else encoders)


def _projecting(config: CascadeKDRun) -> CascadeKDRun:
    """Return a run whose only term is ``align``, of features that come with the batch."""
    return replace(
        config,
        align=replace(config.align, source="data"),
        relations=replace(config.relations, weight=0.0),
        estimate=replace(config.estimate, weight=0.0),
    )


def _count_unet(config: UNetRun, known: Known, side: int) -> StepFlops:
    config = known.whole(config)
    sizes = config.sizes
    autoencoder: AutoencoderKLConfig = known.sizes(config.autoencoder, "autoencoder_kl")
    second = sizes.text_pooled_channels if config.text_2 is not None else None
    first = sizes.text_channels - (second or 0)
    caption, tokens, _, pooled = known.text(config.text, first)
    encoders = caption
    if config.text_2 is not None:
        more, _, _, pooled = known.text(config.text_2, second)
        encoders += more
    lesson, teacher = None, None
    if config.distill is not None:
        theirs: UNetConfig = known.sizes(config.distill.teacher, "unet")
        teacher = TeacherOnMeta(theirs)
        pairs: Any = ()
        if config.distill.features is not None and config.distill.feature_weight > 0:
            pairs = site_pairs(config.distill.features, known.plan(config, theirs))
        lesson = Lesson(teacher, pairs)
    with on_meta():
        system = UNetSystem(
            config, _null(tokens, sizes.text_channels, pooled), autoencoder.downscale, lesson
        )
        encoder = AutoencoderKL(autoencoder)
    encoders += _encoder_flops(encoder, lambda network: network.latent_gaussian(_pixels(side)))
    latent = (
        autoencoder.latent_channels,
        side // autoencoder.downscale,
        side // autoencoder.downscale,
    )
    parts: Mapping[str, Tensor] = {
        "autoencoder_mean": _empty(*latent),
        "autoencoder_std": _empty(*latent),
        "text_hidden": _empty(tokens, sizes.text_channels),
        "text_pooled": _empty(pooled),
    }
    whole = _counted(system, _batch(**parts))
    taught = 0.0 if teacher is None else teacher.flops / _BATCH
    # Counters are nested: the outer one has counted the teacher as well.
    return StepFlops(
        _learning(system.network), whole - taught, taught, 0.0 if config.data.folder else encoders
    )
