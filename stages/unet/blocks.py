"""The blocks of a U-Net: the ways down and up, a level each, and the middle.

Each is a row of resnets, with a stack of transformer blocks after those that have one. Attributes
are named as in the published files, which therefore load without renaming.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from stages.layers import run
from stages.unet.attention import SpatialTransformer, Text
from stages.unet.config import UNetConfig
from stages.unet.features import Features, Taps
from stages.unet.resnet import Downsample, ProjectedTime, ResnetBlock, Upsample

Time = Tensor | Mapping[str, ProjectedTime]
"""The time's embedding, (B, time_channels), activated, or what each resnet, by its path, makes of
it."""


class UNetBlock(nn.Module):
    """Resnets, and the attention after some of them."""

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        in_channels: Sequence[int],
        depths: Sequence[int],
        name: str,
    ) -> None:
        """Build a block of ``level``.

        Args:
            config: Sizes of the network.
            level: The level, 0 being the finest.
            in_channels: What each resnet reads.
            depths: Transformer blocks after each resnet.
            name: Path of the block within the network.
        """
        super().__init__()
        self.name = name
        self.recompute = False
        """Whether training keeps only what its layers are given, and runs them again for the
        gradient: less memory, a third more work."""
        width = config.channels[level]
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, width, config.norm_groups, time_channels=config.time_channels)
            for channels in in_channels
        )
        # Numbered as the resnets they follow, also where some have none.
        self.attentions = nn.ModuleDict(
            {
                str(layer): SpatialTransformer(config, level, depth, f"{name}.attentions.{layer}")
                for layer, depth in enumerate(depths)
                if depth
            }
        )

    def _layer(self, layer: int, x: Tensor, time: Time, text: Text, taps: Taps) -> Tensor:
        """Run a resnet and the attention after it, if there is one."""
        told = time if isinstance(time, Tensor) else time[f"{self.name}.resnets.{layer}"]
        x = run(self.resnets[layer], x, told, recompute=self.recompute)
        taps.see(f"resnets.{layer}", x)
        if str(layer) not in self.attentions:
            return x
        attention = cast(SpatialTransformer, self.attentions[str(layer)])
        x, found = attention(x, text, taps.wanted, self.recompute)
        taps.found |= found
        return taps.see(f"attentions.{layer}", x)


class DownBlock(UNetBlock):
    """A level on the way down: what its layers return is what the way up will read."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        """Build the block of ``level``."""
        width = config.channels[level]
        depths = config.down_depths[level]
        first = config.channels[max(level - 1, 0)]
        in_channels = (first, *[width] * (len(depths) - 1))
        super().__init__(config, level, in_channels, depths, f"down_blocks.{level}")
        self.downsamplers: nn.ModuleList | None = None
        if level + 1 < len(config.channels):
            self.downsamplers = nn.ModuleList([Downsample(width)])

    def forward(
        self, x: Tensor, time: Time, text: Text, wanted: frozenset[str]
    ) -> tuple[Tensor, list[Tensor], Features]:
        """Return ``(B, C, H/2, W/2)``, the skips and what was asked for.

        The last level keeps its size.
        """
        taps = Taps(self.name, wanted)
        skips = []
        for layer in range(len(self.resnets)):
            x = self._layer(layer, x, time, text, taps)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        taps.see("", x)
        return x, skips, taps.found


class MidBlock(UNetBlock):
    """The bottom: two resnets with an attention between them, or a resnet alone."""

    def __init__(self, config: UNetConfig, depth: int) -> None:
        """Build a middle of ``depth`` transformer blocks; 0: of one resnet."""
        level = len(config.channels) - 1
        depths = (depth, 0) if depth else (0,)
        in_channels = [config.channels[level]] * len(depths)
        super().__init__(config, level, in_channels, depths, "mid_block")

    def forward(
        self, x: Tensor, time: Time, text: Text, wanted: frozenset[str]
    ) -> tuple[Tensor, Features]:
        """Return ``(B, C, H, W)`` as it came, and what was asked for."""
        taps = Taps(self.name, wanted)
        for layer in range(len(self.resnets)):
            x = self._layer(layer, x, time, text, taps)
        taps.see("", x)
        return x, taps.found


class UpBlock(UNetBlock):
    """A level on the way up: each resnet reads a skip beside what came before it."""

    def __init__(self, config: UNetConfig, index: int, skip_channels: Sequence[int]) -> None:
        """Build the block of ``index`` in running order, 0 being the deepest."""
        level = len(config.channels) - 1 - index
        width = config.channels[level]
        below = config.channels[min(level + 1, len(config.channels) - 1)]
        own = (below, *[width] * (len(skip_channels) - 1))
        in_channels = [first + skip for first, skip in zip(own, skip_channels, strict=True)]
        depths = config.up_depths[index]
        super().__init__(config, level, in_channels, depths, f"up_blocks.{index}")
        self.upsamplers: nn.ModuleList | None = None
        if level > 0:
            self.upsamplers = nn.ModuleList([Upsample(width)])

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        size: tuple[int, int],
        time: Time,
        text: Text,
        wanted: frozenset[str],
    ) -> tuple[Tensor, Features]:
        """Return ``(B, C, 2H, 2W)`` and what was asked for; the finest level keeps its size.

        Args:
            x: ``(B, C_below, H, W)``.
            skips: One for each resnet; each is taken out when it is read, so that it can be freed.
            size: Height and width of the result.
            time: The time.
            text: The text.
            wanted: Names of the sites asked for, in all of the network.
        """
        taps = Taps(self.name, wanted)
        for layer in range(len(self.resnets)):
            x = self._layer(layer, torch.cat([x, skips.pop(0)], dim=1), time, text, taps)
        if self.upsamplers is not None:
            x = self.upsamplers[0](x, size)
        taps.see("", x)
        return x, taps.found
