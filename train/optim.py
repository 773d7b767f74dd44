"""Optimizers and learning-rate schedules of all runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from cascade.errors import UserError
from cascade.pipelines.placement import computes_bfloat16
from train.offload import OffloadedAdamW
from train.settings import OptimConfig
from train.sharding import part_like


def learning_rate_factor(config: OptimConfig, max_steps: int) -> Callable[[int], float]:
    """Return ``step -> factor of the peak learning rate``.

    Linear warm-up, then constant, or a cosine or linear decay from ``decay_from`` of the run to
    its end.
    """
    warmup = config.warmup(max_steps)
    decay_start = max(warmup, int(config.decay_from * max_steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.schedule == "constant" or step < decay_start:
            return 1.0
        progress = min(1.0, (step - decay_start) / max(1, max_steps - decay_start))
        shape = 1.0 - progress
        if config.schedule == "cosine":
            shape = 0.5 * (1.0 + math.cos(math.pi * progress))
        return config.final_lr_fraction + (1.0 - config.final_lr_fraction) * shape

    return factor


def split_by_decay(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], ...]:
    """Split parameters into (matrices and kernels, vectors and scalars)."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        # A GRN gain is stored as (1, 1, 1, C): what counts is the number of long axes.
        long_axes = sum(size > 1 for size in parameter.shape)
        (matrices if long_axes > 1 else vectors).append(parameter)
    return matrices, vectors


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for hidden matrices and kernels, AdamW for everything else, as one optimizer.

    The update of a matrix is its Nesterov momentum made orthogonal by five Newton-Schulz steps, so
    that every direction of the matrix learns at the same rate. A convolution's kernel is the matrix
    ``(out, in * height * width)``; depthwise kernels, and layers with fewer than 32 channels on
    either side, such as the first and the last, are no hidden matrices.

    Reference: Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks".
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimConfig) -> None:
        """Sort the parameters into the two kinds."""
        hidden: list[nn.Parameter] = []
        matrices: list[nn.Parameter] = []
        vectors: list[nn.Parameter] = []
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            if parameter.dim() in (2, 4) and min(parameter.shape[:2]) >= 32:
                hidden.append(parameter)
            else:
                long_axes = sum(size > 1 for size in parameter.shape)
                (matrices if long_axes > 1 else vectors).append(parameter)
        groups = [
            {"params": hidden, "lr": config.muon_lr, "muon": True, "decay": config.weight_decay},
            {"params": matrices, "lr": config.lr, "muon": False, "decay": config.weight_decay},
            {"params": vectors, "lr": config.lr, "muon": False, "decay": 0.0},
        ]
        super().__init__([group for group in groups if group["params"]], {})
        self.betas = config.betas

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Make one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.grad is not None]
            for parameter in with_grad:
                parameter.mul_(1.0 - group["lr"] * group["decay"])
                if group["muon"]:
                    self._muon_step(parameter, group["lr"])
                else:
                    self._adam_step(parameter, group["lr"])
        return loss

    def _muon_step(self, parameter: Tensor, lr: float, momentum: float = 0.95) -> None:
        state = self.state[parameter]
        grad = parameter.grad
        assert grad is not None, "step() passes only parameters with a gradient"
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(grad, 1.0 - momentum)
        update = torch.lerp(grad, state["momentum"], momentum)
        if isinstance(update, DTensor):  # the products need the matrix as a whole, on every rank
            whole = update.full_tensor()
            update = part_like(orthogonalize(whole.flatten(1)).view_as(whole), update)
        else:
            update = orthogonalize(update.flatten(1)).view_as(update)
        rows, columns = len(parameter), parameter[0].numel()
        parameter.add_(update, alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def _adam_step(self, parameter: Tensor, lr: float, eps: float = 1e-8) -> None:
        state = self.state[parameter]
        grad = parameter.grad
        if "step" not in state:
            state["step"] = torch.zeros(())
            state["mean"] = torch.zeros_like(parameter)
            state["square"] = torch.zeros_like(parameter)
        state["step"] += 1
        step = float(state["step"])
        beta1, beta2 = self.betas
        state["mean"].lerp_(grad, 1.0 - beta1)
        state["square"].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        scale = (state["square"] / (1.0 - beta2**step)).sqrt_().add_(eps)
        parameter.addcdiv_(state["mean"], scale, value=-lr / (1.0 - beta1**step))


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return the nearest (semi-)orthogonal matrix, roughly: singular values end in 0.7..1.2.

    Args:
        matrix: Shape ``(rows, columns)``.
        steps: Newton-Schulz iterations, computed in bfloat16, or in float32 on a device that has no
            instructions for it.

    Returns:
        Same shape and dtype.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.to(torch.bfloat16 if computes_bfloat16(matrix.device) else torch.float32)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.mT
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


def require_low_bit(config: OptimConfig) -> None:
    """Import what ``adamw8bit`` needs; its checkpoints can't be read before.

    Raises:
        UserError: It is not installed.
    """
    if config.name != "adamw8bit":
        return
    try:
        import torchao.optim  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"optim.name is adamw8bit: torchao is not usable here ({error}); pip install torchao, "
            "or use adamw with optim.offload"
        ) from error


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Build AdamW as the options say: plain, fused, in 8 bits, or on the CPU."""
    if config.name == "adamw8bit":
        from torchao.optim import AdamW8bit

        return AdamW8bit(groups, lr=config.lr, betas=config.betas)
    fused = config.fused
    if fused is None:
        devices = {one.device.type for group in groups for one in group["params"]}
        fused = devices <= {"cuda", "cpu"}  # torch's own default has one on neither
    if config.offload:
        return OffloadedAdamW(groups, lr=config.lr, betas=config.betas, fused=fused)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)
    # The fused step can undo a loss scale itself, which would be after clipping; so Lightning
    # refuses to clip at all, in bf16 too, where there is no scale. Without this word of it the
    # scaler undoes its scale before, as for any other optimizer.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimConfig, max_steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Build the optimizer and its learning-rate schedule (one step of it per optimizer step)."""
    optimizer: torch.optim.Optimizer
    if config.name == "muon":
        optimizer = MuonWithAdamW(parameters, config)
    else:
        matrices, vectors = split_by_decay(parameters)
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = _adamw([group for group in groups if group["params"]], config)
    return optimizer, LambdaLR(optimizer, learning_rate_factor(config, max_steps))
