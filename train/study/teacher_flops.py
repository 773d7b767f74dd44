"""What a teacher takes in a step of those that it teaches, counted before anything is trained.

Its forward pass runs on tensors without content, as ``train.study.step_flops`` runs the student's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from cascade.checkpoints.files import on_meta
from cascade.errors import UserError
from cascade.evaluate.flops import FlopCounter
from stages.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from stages.semantic_compressor import CompressorConfig, SemanticCompressor
from stages.unet.config import NUM_SIZES, UNetConfig
from stages.unet.features import sites
from stages.unet.unet import UNet, UNetCondition, UNetOutput
from train.distill.bias_curve import BiasCurve
from train.distill.picture_teacher import default_site
from train.distill.teacher import FrozenTeacher
from train.draws import StepDraws
from train.losses.denoising import noise_batch
from train.study.known_sizes import Known
from train.systems.cascade_kd import CascadeKDRun

_DRAWS = 4096
"""Times that say which share of the samples a teacher is asked about."""


class TeacherOnMeta(FrozenTeacher):
    """A teacher of known sizes and no weights, whose operations are counted apart."""

    def __init__(self, sizes: UNetConfig) -> None:
        """Take the sizes."""
        with on_meta():
            self._unet = UNet(sizes).eval().requires_grad_(False)
        self.flops = 0.0

    @torch.no_grad()
    def __call__(
        self, x_t: Tensor, timesteps: Tensor, cond: UNetCondition, features: Sequence[str] = ()
    ) -> UNetOutput:
        """Run without content."""
        with FlopCounter() as counter:
            output = self._unet(x_t, timesteps, cond, features)
        self.flops += counter.total
        return output


@dataclass(frozen=True)
class PictureTeacherFlops:
    """Of a U-Net that teaches a cascade, by sample of the cascade's."""

    step: float
    """Its answers in the step: what ``teacher_flops`` of the ledger are."""
    encoders: float
    """What a cache holds in their place, where there is one: its latents of the pictures, and the
    features that are kept by picture."""
    features: tuple[int, int, int] | None
    """Channels, rows and columns of the features of ``align``; None: it is off."""


def count_picture_teacher(
    config: CascadeKDRun, known: Known, side: int, caption_tokens: int
) -> PictureTeacherFlops:
    """Count what the terms of a run ask of its teacher.

    Args:
        config: The run, with the sizes of its network.
        known: Finds the teacher's.
        side: Of the pictures in pixels.
        caption_tokens: Of a caption's states.

    Raises:
        UserError: A size, or the curve of ``estimate``, is not known.
    """
    teacher = config.teacher
    if teacher is None or not config.terms:
        return PictureTeacherFlops(0.0, 0.0, None)
    sizes: UNetConfig = known.sizes(teacher.unet, "unet")
    autoencoder: AutoencoderKLConfig = known.sizes(teacher.autoencoder, "autoencoder_kl")
    cells = side // autoencoder.downscale
    pixels = torch.empty(1, 3, side, side, device="meta")
    latents = torch.empty(1, autoencoder.latent_channels, cells, cells, device="meta")
    with on_meta():
        encoder = AutoencoderKL(autoencoder).eval().requires_grad_(False)
    with torch.no_grad(), FlopCounter() as encoding:
        encoder.latent_gaussian(pixels)

    # Without a text encoder, no caption is zeros, of which one token says what all do.
    no_caption = 1
    if teacher.text is not None:
        no_caption = known.text(teacher.text, sizes.text_channels)[1]
    step, encoders, features = 0.0, encoding.total, None
    if "align" in config.terms:
        looking = _asked(sizes, latents, no_caption)
        site = sites(sizes)[config.align.site or default_site(sites(sizes))]
        rows, columns = site.size(cells, cells)
        channels = site.channels
        if config.align.basis is not None:
            kept = _components(Path(config.align.basis))
            looking += 2.0 * rows * columns * channels * kept
            channels = kept
        features = (channels, rows, columns)
        if config.align.source == "latents":
            step += looking
        else:
            encoders += looking
    asked, trusted = _shares(config)
    if asked:
        tokens = caption_tokens if config.teacher_captions else no_caption
        step += asked * _asked(sizes, latents, tokens)
    if trusted:
        compressor: CompressorConfig = known.sizes(config.compressor, "compressor")
        with on_meta():
            compress = SemanticCompressor(compressor).eval().requires_grad_(False)
        with torch.no_grad(), FlopCounter() as again:
            encoder.decode(latents)
            compress.encode(pixels)
        step += trusted * again.total
    return PictureTeacherFlops(step, encoders, features)


def _asked(sizes: UNetConfig, latents: Tensor, tokens: int) -> float:
    """Return the operations of one sample's forward pass."""
    hidden = torch.empty(1, tokens, sizes.text_channels, device="meta")
    cond = UNetCondition(hidden)
    if sizes.text_pooled_channels is not None:
        pooled = torch.empty(1, sizes.text_pooled_channels, device="meta")
        cond = UNetCondition(hidden, pooled, torch.empty(1, NUM_SIZES, device="meta"))
    teacher = TeacherOnMeta(sizes)
    teacher(latents, torch.empty(1, device="meta"), cond)
    return teacher.flops


def _shares(config: CascadeKDRun) -> tuple[float, float]:
    """Return the shares of samples that the teacher predicts, and whose estimates are targets."""
    if not {"relations", "estimate"} & set(config.terms):
        return 0.0, 0.0
    clean = torch.zeros(_DRAWS, 1, 1, 1)
    noised = noise_batch(clean, config.diffusion, StepDraws(config.run.seed, 0), noise=clean)
    log_snr = config.diffusion.noise_schedule().log_snr(noised.t)
    related = torch.zeros_like(log_snr, dtype=torch.bool)
    trusted = torch.zeros_like(related)
    if "relations" in config.terms:
        related = log_snr >= config.relations.min_log_snr
    if "estimate" in config.terms:
        assert config.estimate.curve is not None, "EstimateConfig requires it"
        curve = BiasCurve.read(Path(config.estimate.curve))
        trusted = curve.trusted(log_snr, config.estimate.min_ratio)
    return float((related | trusted).float().mean()), float(trusted.float().mean())


def _components(path: Path) -> int:
    """Return how many components a basis has."""
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; make it with: python -m train.distill feature-basis"
        )
    with safe_open(path, framework="pt") as file:
        return int(file.get_slice("components").get_shape()[1])
