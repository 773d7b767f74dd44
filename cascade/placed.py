"""Where a network computes, which is not always where its weights are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def example_of(network: nn.Module) -> Tensor:
    """Return an empty tensor on the device and in the number format that a network computes in.

    Between two forward passes the weights of a network that accelerate brings in layer by layer
    are on the meta device; its hooks know where they go.

    Args:
        network: A network with weights.
    """
    weight = next(network.parameters())
    device = weight.device
    if weight.is_meta:
        device = next(_execution_devices(network), device)
    return torch.empty(0, device=device, dtype=weight.dtype)


def _execution_devices(network: nn.Module) -> Iterator[torch.device]:
    """Yield the devices that accelerate's hooks name."""
    for module in network.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # several hooks of a module are one of them
            device = getattr(one, "execution_device", None)
            if device is not None:
                yield torch.device(device)
