"""Places within a U-Net whose outputs can be asked for: what feature distillation compares.

A site is named as the module whose output it is, as ``up_blocks.0.attentions.1.transformer_blocks
.2.attn1``, so that a rule that says which teacher's weights a student inherits says as well which
features it imitates. Sites are asked for in the call and returned by it: no hooks, no state that
outlives the call, and gradients flow under activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from stages.unet.config import UNetConfig

Kind = Literal[
    "block",
    "resnet",
    "attention",
    "projection",
    "transformer",
    "self_attention",
    "cross_attention",
    "feed_forward",
]
"""block: after its last layer and resampler. attention: a whole stack with its residual;
projection: the same before its residual. transformer: one block of the stack; the three after it:
the branches of that block, before their residuals."""

Features = dict[str, Tensor]
"""Outputs by the name of their site."""


@dataclass(frozen=True)
class Site:
    """A place whose output can be asked for, and where and how large that output is."""

    name: str
    """Path of the module."""
    kind: Kind
    channels: int
    """Width of the output."""
    level: int
    """How often height and width were halved at the output."""
    tokens: bool
    """Whether the output is (B, h * w, C), rows first; else it is (B, C, h, w)."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the output for latents of ``height`` x ``width``."""
        for _ in range(self.level):  # a halved odd side is rounded up
            height, width = (height + 1) // 2, (width + 1) // 2
        return height, width


@dataclass(frozen=True)
class UNetOutput:
    """A prediction with the features that were asked for."""

    prediction: Tensor
    """(B, out_channels, h, w), the raw prediction."""
    features: Features
    """The outputs by name of site; see ``Site`` for their shapes."""


class Taps:
    """Collects outputs within one module's forward."""

    def __init__(self, where: str, wanted: frozenset[str]) -> None:
        """Take the path of the module, and the names of all sites asked for."""
        self.where = where
        self.wanted = wanted
        self.found: Features = {}

    def see(self, part: str, output: Tensor) -> Tensor:
        """Keep the output of the submodule ``part`` if it is asked for; return it as it came."""
        name = f"{self.where}.{part}" if part else self.where
        if name in self.wanted:
            self.found[name] = output
        return output


def sites(config: UNetConfig) -> dict[str, Site]:
    """Return every site of a U-Net by name, in running order."""
    return {site.name: site for site in _sites(config)}


def _sites(config: UNetConfig) -> Iterator[Site]:
    last = len(config.channels) - 1
    for level, depths in enumerate(config.down_depths):
        where = f"down_blocks.{level}"
        for layer, depth in enumerate(depths):
            yield from _layer(config, where, level, layer, depth)
        yield Site(where, "block", config.channels[level], min(level + 1, last), False)
    if config.mid_depth is not None:
        yield from _layer(config, "mid_block", last, 0, config.mid_depth)
        if config.mid_depth:
            yield from _layer(config, "mid_block", last, 1, 0)
        yield Site("mid_block", "block", config.channels[last], last, False)
    for index, depths in enumerate(config.up_depths):
        where, level = f"up_blocks.{index}", last - index
        for layer, depth in enumerate(depths):
            yield from _layer(config, where, level, layer, depth)
        yield Site(where, "block", config.channels[level], max(level - 1, 0), False)


def _layer(config: UNetConfig, where: str, level: int, layer: int, depth: int) -> Iterator[Site]:
    """Yield the sites of a resnet and of the attention after it, if there is one."""
    width = config.channels[level]
    yield Site(f"{where}.resnets.{layer}", "resnet", width, level, False)
    if not depth:
        return
    stack = f"{where}.attentions.{layer}"
    parts: dict[str, Kind] = {
        "attn1": "self_attention",
        "attn2": "cross_attention",
        "ff": "feed_forward",
    }
    for number in range(depth):
        block = f"{stack}.transformer_blocks.{number}"
        for part, kind in parts.items():
            yield Site(f"{block}.{part}", kind, width, level, True)
        yield Site(block, "transformer", width, level, True)
    yield Site(f"{stack}.proj_out", "projection", width, level, config.linear_projection)
    yield Site(stack, "attention", width, level, False)
