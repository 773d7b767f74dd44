"""What a student U-Net is told by its teacher: outputs, and features at pairs of places.

References: Kim et al., 2023, BK-SDM, arXiv:2305.15798, section 3.2 (task, output and block
features); Gupta et al., 2024, SSD-1B, arXiv:2401.02677 (features of every layer); Lee et al., 2023,
KOALA, arXiv:2312.04005, section 3.3 (self-attention features).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cascade.config import did_you_mean
from stages.unet.compress import StudentPlan
from stages.unet.features import Features, Kind, Site, sites


@dataclass(frozen=True)
class FeatureConfig:
    """Which places of the student imitate which of the teacher's.

    A student's place imitates the teacher's place from which it took its weights, unless ``sites``
    names another.
    """

    kinds: tuple[Kind, ...] = ()
    """Every place of these kinds: "block" in BK-SDM; "resnet" and "attention" in SSD-1B;
    "self_attention" in KOALA."""
    leave_out: tuple[str, ...] = ()
    """Places and whole blocks (``mid_block``) of the student that are left out all the same."""
    sites: dict[str, str] = field(default_factory=dict)
    """Further places of the student -> the teacher's places that they imitate."""
    normalize: bool = False
    """Divide each sample's error by the mean square of the teacher's features, so that places of
    large features do not outweigh the others (LAPTOP-Diff, arXiv:2404.11098)."""


@dataclass(frozen=True)
class SitePair:
    """A place of the student and the one of the teacher that it imitates."""

    student: str
    teacher: str


def site_pairs(config: FeatureConfig, plan: StudentPlan) -> tuple[SitePair, ...]:
    """Return the pairs in the student's running order.

    Raises:
        ValueError: A name is no place, a pair's shapes differ, or nothing is left to imitate.
    """
    ours, theirs = sites(plan.student), sites(plan.teacher)
    for name in config.leave_out:
        if not any(site == name or site.startswith(f"{name}.") for site in ours):
            raise ValueError(
                f"leave_out: {name!r} is no place of the student{did_you_mean(name, ours)}"
            )
    for name, other in config.sites.items():
        for which, one, known in (("student", name, ours), ("teacher", other, theirs)):
            if one not in known:
                raise ValueError(
                    f"sites: {one!r} is no place of the {which}{did_you_mean(one, known)}"
                )
    pairs = []
    for name, site in ours.items():
        left_out = any(name == one or name.startswith(f"{one}.") for one in config.leave_out)
        if name in config.sites:
            other = config.sites[name]
        elif site.kind in config.kinds and not left_out:
            other = plan.teacher_name(name)
        else:
            continue
        _check_pair(site, theirs.get(other), other)
        pairs.append(SitePair(name, other))
    if not pairs:
        raise ValueError("no place of the student is of these kinds; change kinds or leave_out")
    return tuple(pairs)


def _check_pair(site: Site, other: Site | None, name: str) -> None:
    if other is None:
        raise ValueError(f"{site.name}: the teacher has no {name}; name another under sites")
    differing = [
        f"{what} {getattr(site, what)} and {getattr(other, what)}"
        for what in ("channels", "level", "tokens")
        if getattr(site, what) != getattr(other, what)
    ]
    if differing:
        raise ValueError(
            f"{site.name} can't imitate the teacher's {name}: {', '.join(differing)}; leave it "
            "out, or name another under sites"
        )


def output_loss(predicted: Tensor, taught: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted mean squared distance of two predictions, a scalar in float32.

    Args:
        predicted: The student's, ``(B, 4, h, w)``.
        taught: The teacher's.
        weight: Of each sample, ``(B,)``.
    """
    error = (predicted.float() - taught.float()).square().flatten(1).mean(dim=1)  # (B,)
    return (error * weight).mean()


def feature_losses(
    ours: Features,
    theirs: Features,
    pairs: tuple[SitePair, ...],
    weights: Tensor | None = None,
    *,
    normalize: bool = False,
) -> dict[str, Tensor]:
    """Return the student's place -> mean squared distance there, scalars in float32.

    Args:
        ours: The student's features by place, of any shape ``(B, ...)``.
        theirs: The teacher's.
        pairs: Which belong together.
        weights: How much each sample counts, ``(B,)``; None: all the same.
        normalize: See ``FeatureConfig``.
    """
    losses = {}
    for pair in pairs:
        # In float16 a difference of 300 has a square that is infinite.
        student, teacher = ours[pair.student].float(), theirs[pair.teacher].float()
        error = (student - teacher).square().flatten(1).mean(dim=1)  # (B,)
        if normalize:  # sample by sample, so that no split into processes changes it
            size = teacher.square().flatten(1).mean(dim=1)
            error = error / size.clamp(min=torch.finfo(torch.float32).tiny)
        losses[pair.student] = (error if weights is None else error * weights).mean()
    return losses


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of all places' losses: BK-SDM's plain sum."""
    return torch.stack(list(losses.values())).sum()
