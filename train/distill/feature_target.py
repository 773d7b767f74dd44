"""What a cascade is told of a picture by a U-Net's features: which, where, and how small.

Features of the clean picture are a function of the picture alone, so they can be kept. Whole ones
are large: SDXL's 32 x 32 tokens of 1280 channels take 2.6 MB a picture in float16. Two ways to keep
less, both part of the fingerprint: ``basis``, principal components of the features of some
pictures, measured once by ``python -m train.distill feature-basis`` (64 of them at 24 x 24 take 74
KB), and ``max_side``, a smaller grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from cascade.checkpoints.files import atomic_path, file_hash
from cascade.checkpoints.written_tensors import save_tensors
from cascade.errors import UserError
from train.distill.picture_teacher import PictureTeacher, PictureTeacherConfig, default_site
from train.losses.cascade_distillation import on_grid


@dataclass(frozen=True)
class FeatureTarget:
    """Features of clean pictures that a cascade is to imitate."""

    teacher: PictureTeacherConfig
    site: str | None = None
    """Place of the teacher; null: its first self-attention stack's last on the way up."""
    timestep: int = 200
    """Timestep of little noise at which the teacher looks (100 to 250 in published use)."""
    basis: str | None = None
    """File of principal components; null: all channels."""
    max_side: int | None = None
    """Longest side of the grid that is kept; null: the teacher's own."""


class FeatureSource:
    """Computes the features of a target."""

    def __init__(self, target: FeatureTarget, teacher: PictureTeacher | None = None) -> None:
        """Find the teacher; only headers are read.

        Args:
            target: Which features.
            teacher: The target's, if it is open.

        Raises:
            UserError: It is not there, has no such place, or the basis is another's.
        """
        self.target = target
        self.teacher = PictureTeacher(target.teacher) if teacher is None else teacher
        known = self.teacher.sites
        self.site = default_site(known) if target.site is None else target.site
        if self.site not in known:
            names = [name for name, site in known.items() if site.kind == "self_attention"]
            raise UserError(
                f"teacher's site {self.site!r}: no place of {target.teacher.unet}; its "
                f"self-attentions are {names[0]} to {names[-1]}"
            )
        self.basis = None if target.basis is None else Basis.read(Path(target.basis), self)

    @property
    def channels(self) -> int:
        """Width of the features."""
        if self.basis is not None:
            return self.basis.components.shape[1]
        return self.teacher.sites[self.site].channels

    def fingerprint(self) -> str:
        """Return what names the features."""
        target = self.target
        basis = "all" if target.basis is None else file_hash(target.basis)
        parts = (self.site, target.timestep, basis, target.max_side)
        return "/".join([self.teacher.fingerprint(), *map(str, parts)])

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """Return the features (B, C, h, w), float32, of pixels (B, 3, H, W) in [0, 1].

        Raises:
            UserError: Pictures of a size that the teacher does not know.
        """
        self.teacher.check_pictures([(pixels.shape[-2], pixels.shape[-1])])
        return self.of_latents(self.teacher.latents(pixels))

    def of_latents(self, latents: Tensor) -> Tensor:
        """Return the features (B, C, h, w), float32, of the teacher's latents of clean pictures."""
        found = self.teacher.features(latents, self.target.timestep, [self.site])[self.site]
        if self.basis is not None:
            found = self.basis.project(found)
        side = self.target.max_side
        if side is not None and max(found.shape[-2:]) > side:
            scale = side / max(found.shape[-2:])
            rows, columns = (max(1, round(one * scale)) for one in found.shape[-2:])
            found = on_grid(found, (rows, columns))
        return found


@dataclass(frozen=True)
class Basis:
    """A mean and principal components of features."""

    mean: Tensor
    """(C,)."""
    components: Tensor
    """(C, K), orthonormal columns, largest variance first."""

    def project(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, K, h, w)."""
        centred = features - self.mean.to(features.device)[:, None, None]
        return torch.einsum("bchw,ck->bkhw", centred, self.components.to(features.device))

    @classmethod
    def read(cls, path: Path, source: FeatureSource) -> Basis:
        """Read a file of ``write``.

        Raises:
            UserError: It is not there, or was measured on other features.
        """
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; make it with: python -m train.distill feature-basis"
            )
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        wanted = _measured_on(source)
        differing = [name for name, value in wanted.items() if metadata.get(name) != value]
        if differing:
            name = differing[0]
            raise UserError(
                f"{path}: measured with {name} {metadata.get(name)}, but this target has "
                f"{wanted[name]}; measure it again"
            )
        tensors = load_file(path)
        return cls(tensors["mean"], tensors["components"])

    def write(self, path: Path, source: FeatureSource) -> None:
        """Write the basis with what it was measured on."""
        tensors = {"mean": self.mean.contiguous(), "components": self.components.contiguous()}
        with atomic_path(path) as temporary:
            save_tensors(tensors, temporary, _measured_on(source))


def _measured_on(source: FeatureSource) -> dict[str, str]:
    return {
        "teacher": source.teacher.fingerprint(),
        "site": source.site,
        "timestep": str(source.target.timestep),
    }


class BasisFit:
    """Adds up first and second moments of features; their memory does not grow with pictures."""

    def __init__(self, channels: int) -> None:
        """Start with nothing."""
        self.count = 0
        self._sum = torch.zeros(channels, dtype=torch.float64)
        self._products = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take features (B, C, h, w)."""
        tokens = features.permute(0, 2, 3, 1).flatten(0, 2).double().cpu()  # (B h w, C)
        self.count += len(tokens)
        self._sum += tokens.sum(dim=0)
        self._products += tokens.T @ tokens

    def basis(self, num_components: int) -> tuple[Basis, float]:
        """Return the largest components and their share of the variance.

        Raises:
            UserError: There are fewer channels or tokens than components.
        """
        channels = len(self._sum)
        if not 1 <= num_components <= min(channels, self.count - 1):
            raise UserError(
                f"--components {num_components}: the features have {channels} channels and "
                f"{self.count} positions; take fewer components"
            )
        mean = self._sum / self.count
        covariance = self._products / self.count - mean[:, None] * mean
        values, vectors = torch.linalg.eigh(covariance)  # rising
        kept = cast(Tensor, vectors[:, -num_components:].flip(1))
        # A component's sign is anybody's guess: the largest entry is positive.
        largest = kept.gather(0, kept.abs().argmax(dim=0, keepdim=True))
        share = float(values[-num_components:].sum() / values.clamp(min=0).sum())
        return Basis(mean.float(), (kept * largest.sign()).float()), share
