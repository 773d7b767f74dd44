"""Linear layers whose weights lie in memory as int8: half of bfloat16, a quarter of float32.

Each output has a scale of its own, and its weights are the nearest of 255 multiples of it; they are
multiplied out whenever a layer runs, so that the products, sums and activations are those of the
network's own number format. Nothing is learned and no data is needed.

Reference: symmetric rounding by output channel, as in Jacob et al., 2018, arXiv:1712.05877, section
2; of weights alone as in Dettmers et al., 2022, arXiv:2208.07339.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stages.linear import Linear, linear

_LEVELS = 127
_MIN_WEIGHTS = 2**12
"""Smaller layers keep theirs: scales would take as much."""
_READ_BY_OTHERS = (
    *("mapper", "text_mapper", "pooled_mapper", "image_mapper", "text_expand", "text_project"),
    *("linear_1", "linear_2", "time_emb_proj"),
)
"""Layers of embeddings, which run once a picture and tell the network's number format."""


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Take ``(out, in)`` int8, ``(out, 1)`` and ``(out,)``."""
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def of(cls, layer: nn.Linear) -> Int8Linear:
        """Round a layer's weight; its scales have its number format."""
        weight = layer.weight.detach()
        largest = weight.abs().amax(dim=1, keepdim=True).float()  # (out, 1)
        # A row of zeros needs no scale; one too small to be written would make infinities.
        tiny = torch.finfo(weight.dtype).tiny
        scale = (largest / _LEVELS).to(weight.dtype).clamp_min(tiny)
        rounded = (weight.float() / scale.float()).round_().clamp_(-_LEVELS, _LEVELS)
        bias = None if layer.bias is None else layer.bias.detach()
        return cls(rounded.to(torch.int8), scale, bias)

    @property
    def dense(self) -> Tensor:
        """The weight ``(out, in)``, multiplied out."""
        return self.weight * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.dense, self.bias)

    def extra_repr(self) -> str:
        """Say the widths, as a linear layer does."""
        outputs, inputs = self.weight.shape
        return f"in_features={inputs}, out_features={outputs}, bias={self.bias is not None}"


def to_int8(network: nn.Module) -> int:
    """Round the weights of a network's linear layers, in place.

    Blocks' own alone: convolutions, and what embeds times and texts, stay.

    Args:
        network: Of ``stages``, loaded and with what is merged into it.

    Returns:
        How many bytes smaller it is; 0 if all of its layers are small.
    """
    before = _bytes(network)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            embeds = name in _READ_BY_OTHERS or isinstance(parent, nn.ModuleDict)
            if isinstance(child, Linear) and not embeds and child.weight.numel() >= _MIN_WEIGHTS:
                setattr(parent, name, Int8Linear.of(child))
    return before - _bytes(network)


def is_int8(network: nn.Module) -> bool:
    """Return whether a network's weights have been rounded."""
    return any(isinstance(one, Int8Linear) for one in network.modules())


def unpacked_bytes(network: nn.Module) -> int:
    """Return the most bytes that a multiplied-out weight takes while its layer runs."""
    layers = [one for one in network.modules() if isinstance(one, Int8Linear)]
    return max((one.weight.numel() * one.scale.element_size() for one in layers), default=0)


def _bytes(network: nn.Module) -> int:
    return sum(one.numel() * one.element_size() for one in network.parameters())
