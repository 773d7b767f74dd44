"""How biased a U-Net's estimate of a picture is once it is brought into Stage C's space.

The estimate is the mean of all pictures that the noised one may have been. Its latents are not the
mean of their latents: a blurred picture's have a smaller spread. The ratio of the spreads says
where an estimate may be a target. It is near 1 at little noise, and stays there longer for a
teacher whose estimates are sharp, a step-distilled one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cascade.checkpoints.files import atomic_write_text
from cascade.config import from_dict, to_dict
from cascade.errors import UserError
from train.data.cached import CachedBatch
from train.distill.picture_teacher import PictureTeacher
from train.draws import StepDraws
from train.losses.cascade_distillation import interpolate_curve


@dataclass(frozen=True)
class BiasPoint:
    """What was measured at one timestep."""

    timestep: int
    """Of the teacher, 0 to 999."""
    log_snr: float
    """Of the teacher's latents."""
    ratio: float
    """Spread of the estimate's latents over that of the truth's: standard deviations over pictures
    and positions, of all channels together."""
    distance: float
    """Mean squared distance of both, over the variance of the truth's: 0 is no difference, 2 is
    another picture altogether."""

    def __post_init__(self) -> None:
        """Refuse what nobody measured: a term would be off by it and no one would know."""
        for name in ("log_snr", "ratio", "distance"):
            value = getattr(self, name)
            if not math.isfinite(value) or (name != "log_snr" and value < 0):
                raise ValueError(f"{name} is {value}; a finite number is needed, no negative one")

    @property
    def likeness(self) -> float:
        """The ratio, or one over it where the spread is too large: 1 is unbiased, 0 the worst."""
        return min(self.ratio, 1.0 / self.ratio) if self.ratio > 0 else 0.0


@dataclass(frozen=True)
class BiasCurve:
    """What was measured, and of what."""

    teacher: str
    """Fingerprint of the U-Net and its autoencoder."""
    compressor: str
    """Hash of the compressor."""
    captions: bool
    """Whether the teacher was told the captions."""
    pictures: int
    """Pictures that were looked at."""
    roundtrip_ratio: float
    """The ratio of a picture that only went through the autoencoder: the most that can be."""
    roundtrip_distance: float
    """Its distance."""
    points: tuple[BiasPoint, ...]
    """By rising timestep."""

    def __post_init__(self) -> None:
        """Refuse what is no curve."""
        timesteps = [point.timestep for point in self.points]
        if len(timesteps) < 2 or timesteps != sorted(set(timesteps)):
            raise ValueError(f"points are at the timesteps {timesteps}; two or more, rising")

    def trusted(self, log_snr: Tensor, min_ratio: float) -> Tensor:
        """Return whether an estimate is a target at these log-SNRs, bool of the same shape.

        The ratio, or one over it where the spread is too large, must be at least ``min_ratio``, at
        this and at all less noise: an untrained teacher's spread rises again where its estimates
        are noise, and passes through 1 on its way. Noise above what was measured is not trusted.
        """
        falling = sorted(self.points, key=lambda point: -point.log_snr)
        ratios = torch.tensor([point.likeness for point in falling])
        xs = torch.tensor([point.log_snr for point in falling]).flip(0).to(log_snr.device)
        ys = ratios.cummin(0).values.flip(0).to(log_snr.device)
        return (interpolate_curve(log_snr.float(), xs, ys) >= min_ratio) & (log_snr >= xs[0])

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        atomic_write_text(path, json.dumps(to_dict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> BiasCurve:
        """Read a file of ``write``.

        Raises:
            UserError: It is not there, or is no curve.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{path}: no such file; measure it with: python -m train.distill reencode-bias"
            ) from None
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error})") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}: an object with the fields of BiasCurve is needed")
        return from_dict(cls, values, str(path))


class _Spread:
    """Adds up what ratio and distance are made of."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}
        self.errors = 0.0

    def add(self, estimate: Tensor, truth: Tensor) -> None:
        """Take latents (B, C, h, w)."""
        for name, one in (("estimate", estimate), ("truth", truth)):
            values = one.double().transpose(0, 1).flatten(1).cpu()  # (C, B h w)
            moments = torch.stack([values.sum(dim=1), values.square().sum(dim=1)])
            self.sums[name] = self.sums.get(name, torch.zeros_like(moments)) + moments
        self.errors += float((estimate.double() - truth.double()).square().sum())
        self.count += truth.shape[0] * truth.shape[2] * truth.shape[3]

    def variance(self, name: str) -> float:
        """Return the variance, summed over channels."""
        first, second = self.sums[name] / self.count
        return float((second - first.square()).sum())

    def result(self) -> tuple[float, float]:
        """Return ratio and distance."""
        truth = self.variance("truth")
        ratio = (self.variance("estimate") / truth) ** 0.5
        return ratio, self.errors / self.count / truth


@torch.no_grad()
def measure_bias(
    teacher: PictureTeacher,
    compress: Callable[[Tensor], Tensor],
    batches: Iterable[CachedBatch],
    timesteps: list[int],
    *,
    compressor: str,
    captions: bool,
    seed: int = 0,
) -> BiasCurve:
    """Measure the curve.

    Args:
        teacher: Loaded.
        compress: Pixels (B, 3, H, W) in [0, 1] to Stage C's latents.
        batches: With pixels, and text states if ``captions``; on the teacher's device.
        timesteps: Of the teacher, in any order.
        compressor: Hash of what ``compress`` runs.
        captions: Whether the teacher is told the captions.
        seed: Of the noise.

    Raises:
        UserError: There are no pictures, or all are alike, or the teacher does not know their size
            or says what is no number.
    """
    wanted = sorted(set(timesteps))
    spreads = {timestep: _Spread() for timestep in wanted}
    roundtrip, pictures = _Spread(), 0
    for number, batch in enumerate(batches):
        pixels = batch.require("pixels")
        teacher.check_pictures([(pixels.shape[-2], pixels.shape[-1])])
        truth = compress(pixels)
        latents = teacher.latents(pixels)
        roundtrip.add(compress(teacher.pixels(latents)), truth)
        text = (batch.require("text_hidden"), batch.require("text_pooled")) if captions else None
        noise = StepDraws(seed, number).normal("bias", latents.shape).to(latents)
        for timestep in wanted:
            at = torch.full((len(latents),), float(timestep), device=latents.device)
            x_t = teacher.noised(latents, noise, at)
            predicted, _ = teacher.ask(x_t, at, text)
            estimate = teacher.estimate(predicted, x_t, at)
            spreads[timestep].add(compress(teacher.pixels(estimate)), truth)
        pictures += len(pixels)
    if not pictures or roundtrip.variance("truth") <= 0:
        raise UserError("reencode-bias: no pictures, or all of them are alike; name others")
    points = []
    for timestep in wanted:
        ratio, distance = spreads[timestep].result()
        if not math.isfinite(ratio + distance):
            raise UserError(
                f"reencode-bias: the teacher's estimates at timestep {timestep} are not finite; "
                "take --dtype float32, or weights that draw pictures"
            )
        log_snr = float(teacher.log_snr(torch.tensor([float(timestep)])))
        points.append(BiasPoint(timestep, log_snr, ratio, distance))
    ratio, distance = roundtrip.result()
    return BiasCurve(
        teacher=teacher.fingerprint(),
        compressor=compressor,
        captions=captions,
        pictures=pictures,
        roundtrip_ratio=ratio,
        roundtrip_distance=distance,
        points=tuple(points),
    )
