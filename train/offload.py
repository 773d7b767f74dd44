"""AdamW whose states and arithmetic are in the CPU's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class OffloadedAdamW(Optimizer):
    """Steps copies of the parameters on the CPU and brings the result back.

    The device holds weights and gradients alone. Every step moves gradients and weights to the CPU
    and weights back, 12 bytes a parameter. The states are those of torch's AdamW, in its layout: a
    run may go on with or without.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], fused: bool
    ) -> None:
        """Take parameter groups as AdamW does; ``fused`` chooses the CPU's kernel."""
        super().__init__(groups, {"lr": lr, "betas": betas})
        # Pinned memory is what a GPU reads without a detour.
        self._hosts: dict[Tensor, Tensor] = {
            one: torch.empty_like(one, device="cpu", pin_memory=one.is_cuda)
            for group in self.param_groups
            for one in group["params"]
        }
        inner_groups = [
            {**group, "params": [self._hosts[one] for one in group["params"]]}
            for group in self.param_groups
        ]
        self._inner = torch.optim.AdamW(inner_groups, lr=lr, betas=betas, fused=fused)
        self._share_options()

    def _share_options(self) -> None:
        """Let options that AdamW adds be seen from outside, and what is set there act inside."""
        for outer, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            for name, value in inner.items():
                outer.setdefault(name, value)
            inner.update({name: value for name, value in outer.items() if name != "params"})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Make one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._share_options()
        for parameter, host in self._hosts.items():
            host.grad = None
            if parameter.grad is not None:
                # Weights may have been loaded since the last step, so they are brought every time.
                host.copy_(parameter, non_blocking=True)
                host.grad = torch.empty_like(host, pin_memory=parameter.is_cuda)
                host.grad.copy_(parameter.grad, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._inner.step()
        for parameter, host in self._hosts.items():
            if host.grad is not None:
                parameter.copy_(host, non_blocking=True)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return what AdamW itself would."""
        self._share_options()
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take AdamW's states."""
        self._inner.load_state_dict(state_dict)
        for outer, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            outer.update({name: value for name, value in inner.items() if name != "params"})
