"""Continuous-time consistency distillation in TrigFlow, and how a network changes along a path.

Reference: Lu & Song, 2024, arXiv:2410.11081, section 4 and algorithm 1; the constants for latents:
Chen et al., 2025, arXiv:2503.09641 (SANA-Sprint).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from cascade.diffusion.trigflow import along

Velocity = Callable[[Tensor, Tensor], Tensor]
"""A network as TrigFlow: ``(x_t, angle (B,)) -> v``."""


@dataclass(frozen=True)
class TangentConfig:
    """The direction in which a student is moved."""

    derivative: Literal["jvp", "difference"] = "jvp"
    """How the network's change along the teacher's path is computed: exactly, by forward-mode
    differentiation, or by a central difference of two more passes, for a network with an
    operation that has no such derivative."""
    difference_step: float = 5e-3
    """Half the angle between the two passes of a difference, in radians."""
    warmup_steps: int | None = None
    """Steps over which the change counts from nothing to whole (10000 in sCM, 4000 of SANA-Sprint's
    runs); the rest of the direction counts from the start. Null: 1000, and none for a student that
    starts from an earlier one (``init_from``), which would unlearn its jumps."""
    normalize: float | None = 0.1
    """Each sample's direction g becomes ``g / (|g| + normalize)``, with ``|g|`` its root mean
    square; null leaves it as it is."""

    def __post_init__(self) -> None:
        """Refuse what moves nothing."""
        if (self.warmup_steps or 0) < 0 or not self.difference_step > 0:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must not be negative, difference_step="
                f"{self.difference_step} must be positive"
            )
        if self.normalize is not None and not self.normalize > 0:
            raise ValueError(f"normalize is {self.normalize}; it must be positive, or null")


@torch.no_grad()
def change_along(
    network: Velocity, x: Tensor, angle: Tensor, x_rate: Tensor, angle_rate: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a network's output and its derivative along a path, by forward-mode differentiation.

    In float32 or wider, and without compiled blocks: attention is written out, as its fast kernels
    know no tangents. It costs about two passes.

    Args:
        network: The network.
        x: ``(B, ...)``.
        angle: ``(B,)``.
        x_rate: How x changes.
        angle_rate: How the angle changes, ``(B,)``.

    Returns:
        Output and derivative, shaped as x.
    """
    eager = torch.compiler.set_stance("force_eager")
    plain = torch.autocast(x.device.type, enabled=False)
    with eager, plain, sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        out = network(
            forward_ad.make_dual(x, x_rate.contiguous()), forward_ad.make_dual(angle, angle_rate)
        )
        value, rate = forward_ad.unpack_dual(out)
        assert rate is not None, "a network's output depends on its input"
        return value, rate


@torch.no_grad()
def difference_along(
    network: Velocity, x: Tensor, angle: Tensor, x_rate: Tensor, angle_rate: Tensor, step: float
) -> Tensor:
    """Return the derivative of ``change_along`` by a central difference; its error is step^2."""
    with torch.autocast(x.device.type, enabled=False):
        ahead = network(x + step * x_rate, angle + step * angle_rate)
        behind = network(x - step * x_rate, angle - step * angle_rate)
    return (ahead - behind) / (2.0 * step)


@torch.no_grad()
def consistency_tangent(
    student: Velocity,
    x: Tensor,
    angle: Tensor,
    taught: Tensor,
    config: TangentConfig,
    progress: float = 1.0,
) -> Tensor:
    """Return the direction g, before it is normalised: ``cos t`` times how the end changes.

    The end ``f = cos(t) x - sin(t) v`` of the teacher's path must not change along it; at the
    solution g is 0.

    Args:
        student: The student.
        x: TrigFlow's ``x_t``, ``(B, ...)``.
        angle: ``(B,)``.
        taught: The teacher's velocity there.
        config: How.
        progress: Share of the warm-up that is done, in [0, 1].

    Returns:
        ``(B, ...)``.

    Reference: arXiv:2410.11081, algorithm 1.
    """
    sin, cos = angle.sin(), angle.cos()
    wide_sin, wide_cos = along(sin, x), along(cos, x)
    # Multiplied by cos sin beforehand, the derivative stays finite at both ends.
    rates = (wide_cos * wide_sin * taught, cos * sin)
    if config.derivative == "jvp":
        said, change = change_along(student, x, angle, *rates)
    else:
        with torch.autocast(x.device.type, enabled=False):
            said = student(x, angle)
        change = difference_along(student, x, angle, *rates, config.difference_step)
    return -wide_cos.square() * (said - taught) - progress * (wide_cos * wide_sin * x + change)


def normalized(tangent: Tensor, floor: float | None) -> Tensor:
    """Return ``g / (|g| + floor)`` sample by sample, ``|g|`` a root mean square."""
    if floor is None:
        return tangent
    size = tangent.flatten(1).square().mean(dim=1).sqrt()
    return tangent / (along(size, tangent) + floor)


def consistency_errors(predicted: Tensor, tangent: Tensor) -> Tensor:
    """Return each sample's loss ``|v - sg(v) - g|^2``, ``(B,)``, whose gradient is along g."""
    return (predicted - predicted.detach() - tangent).flatten(1).square().mean(dim=1)


class TimeWeight(nn.Module):
    """Learned weight of the loss at each angle: it evens out the gradient over noise levels.

    The loss of a sample becomes ``exp(-u(t)) loss + u(t)``, which is least where u is the log of
    the loss expected there.

    Reference: Karras et al., 2024, arXiv:2312.02696, section 2.2 and appendix B.4.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, channels: int = 64) -> None:
        """Begin with a weight of 1 everywhere."""
        super().__init__()
        generator = torch.Generator().manual_seed(0)  # constants, like those of an embedding
        frequencies = torch.randn(channels, generator=generator)
        self.register_buffer("frequencies", frequencies)
        self.register_buffer("phases", torch.rand(channels, generator=generator) * 2 * torch.pi)
        self.out = nn.Linear(channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, errors: Tensor, angle: Tensor) -> Tensor:
        """Return the weighted losses, ``(B,)``, of losses and angles ``(B,)``."""
        waves = (angle.float()[:, None] * self.frequencies + self.phases).cos()
        with torch.autocast(angle.device.type, enabled=False):
            log_size = self.out(waves)[:, 0]
        return errors * torch.exp(-log_size) + log_size


def draw_angles(
    count: int,
    generator: torch.Generator,
    span: tuple[float, float],
    mean: float,
    spread: float,
    last_share: float,
) -> Tensor:
    """Draw angles whose ``log tan`` is normal, cut to a span, a share of them at its end.

    Sampling begins at the end, and in one step asks there alone.
    """
    log_tan = mean + spread * torch.randn(count, generator=generator)
    angles = log_tan.exp().atan().clamp(*span)
    last = torch.rand(count, generator=generator) < last_share
    return torch.where(last, span[1], angles)
