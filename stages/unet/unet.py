"""The denoising U-Net of SD 1.x, SD 2.x and SDXL, and of every student compressed from them.

Convolutional resnets on a pyramid of levels, with attention to the picture itself and to the text
between them, and skips from the way down to the way up.

Attributes are named as in the published diffusers files, which therefore load without renaming.

Reference: Rombach et al., 2022, arXiv:2112.10752; Podell et al., 2023, SDXL, arXiv:2307.01952.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.embeddings import timestep_embedding
from stages.linear import Linear
from stages.overwrite import silu
from stages.unet.attention import SpatialTransformer, Text, TransformerBlock
from stages.unet.blocks import DownBlock, MidBlock, Time, UNetBlock, UpBlock
from stages.unet.config import NUM_SIZES, UNetConfig
from stages.unet.features import Features, UNetOutput, sites
from stages.unet.resnet import ProjectedTime, ResnetBlock


@dataclass(frozen=True)
class UNetCondition:
    """What a U-Net is told. SD 1.x and 2.x are told the text's hidden states alone."""

    text_hidden: Tensor
    """(B, L, D): hidden states of the text; of SDXL, both text models' side by side."""
    text_pooled: Tensor | None = None
    """(B, P): the projected pooled state, of SDXL."""
    sizes: Tensor | None = None
    """(B, 6): original height and width, top and left of the crop, target height and width, in
    pixels, of SDXL; integers or float32."""


@dataclass(frozen=True)
class UNetPrepared:
    """A condition after everything that does not change from step to step."""

    text: Text
    """What each transformer block asks of the text, in the network's number format."""
    added: Tensor | None
    """(B, time_channels): the pooled text and the sizes, embedded; None in SD 1.x and 2.x."""
    projected: Mapping[str, ProjectedTime] | None = None
    """What each resnet, by its path, makes of one time; None: any time can be told."""


class Embedding(nn.Module):
    """Two linear layers: an embedding's way to the resnets."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """Take both widths."""
        super().__init__()
        self.linear_1 = Linear(in_channels, out_channels)
        self.linear_2 = Linear(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in) -> (B, C_out), in the layers' number format."""
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class UNet(nn.Module):
    """The denoiser."""

    def __init__(self, config: UNetConfig) -> None:
        """Build the U-Net of ``config``; a new one predicts zero."""
        super().__init__()
        self.config = config
        self.sites = sites(config)
        """Every place whose output can be asked for, by name, in running order."""
        widths = config.channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], kernel_size=3, padding=1)
        self.time_embedding = Embedding(widths[0], config.time_channels)
        self.add_embedding: Embedding | None = None
        if config.text_pooled_channels is not None and config.size_channels is not None:
            added_channels = config.text_pooled_channels + NUM_SIZES * config.size_channels
            self.add_embedding = Embedding(added_channels, config.time_channels)
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in range(len(widths)))
        self.mid_block: MidBlock | None = None
        if config.mid_depth is not None:
            self.mid_block = MidBlock(config, config.mid_depth)
        skips = self._skip_channels(config)
        self.up_blocks = nn.ModuleList(
            UpBlock(config, index, [skips.pop() for _ in depths])
            for index, depths in enumerate(config.up_depths)
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, kernel_size=3, padding=1)
        self._init_weights()

    @staticmethod
    def _skip_channels(config: UNetConfig) -> list[int]:
        """Return the widths of what the way down leaves: its start, each layer, each resampling."""
        skips = [config.channels[0]]
        last = len(config.channels) - 1
        for level, depths in enumerate(config.down_depths):
            skips += [config.channels[level]] * (len(depths) + (level < last))
        return skips

    def _init_weights(self) -> None:
        """Start every residual branch of a picture at zero, as the original code does."""
        for layer in [self.conv_out, *self.modules()]:
            if isinstance(layer, ResnetBlock):
                layer = layer.conv2
            elif isinstance(layer, SpatialTransformer):
                layer = layer.proj_out
            elif layer is not self.conv_out:
                continue
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def set_recompute(self, blocks: Iterable[str] | None = None) -> None:
        """Choose whose layers training runs again instead of keeping what they computed.

        Args:
            blocks: Names as ``down_blocks.2`` and ``mid_block``; the others are switched off. None:
                all blocks.

        Raises:
            ValueError: A name is no block's.
        """
        own = {module.name: module for module in self.modules() if isinstance(module, UNetBlock)}
        chosen = set(own if blocks is None else blocks)
        if unknown := sorted(chosen - own.keys()):
            raise ValueError(f"{unknown[0]!r} is no block of this U-Net: {', '.join(own)}")
        for name, block in own.items():
            block.recompute = name in chosen

    @property
    def recompute(self) -> bool:
        """Whether all blocks are run again in the backward pass; see ``set_recompute``."""
        blocks = [module for module in self.modules() if isinstance(module, UNetBlock)]
        return all(block.recompute for block in blocks)

    @recompute.setter
    def recompute(self, value: bool) -> None:
        self.set_recompute(None if value else ())

    def prepare(self, cond: UNetCondition) -> UNetPrepared:
        """Compute what does not change from step to step, once per picture.

        Raises:
            ValueError: The condition is not what this network is told.
        """
        text = self._text(cond)
        blocks = (block for block in self.modules() if isinstance(block, TransformerBlock))
        asked = {block.name: block.attn2.keys_values(text) for block in blocks}
        return UNetPrepared(asked, self._added(cond))

    def at_times(self, prepared: UNetPrepared, times: Tensor) -> list[UNetPrepared]:
        """Compute what depends on the time alone, for all steps at once.

        Args:
            prepared: The result of ``prepare``.
            times: Timesteps ``(S,)`` as ``forward`` takes them.

        Returns:
            For each time the condition at it; with it ``forward`` does not look at its
            ``timesteps``.
        """
        rows = self.time_embedding(timestep_embedding(times, self.config.channels[0]))
        count = 1
        if prepared.added is not None:  # each of B is told something else beside the time
            count = len(prepared.added)
            rows = (rows[:, None] + prepared.added).flatten(0, 1)
        rows = F.silu(rows)  # (S * count, time_channels)
        made = {
            f"{block.name}.resnets.{layer}": cast(ResnetBlock, resnet).project_time(rows).shift
            for block in self.modules()
            if isinstance(block, UNetBlock)
            for layer, resnet in enumerate(block.resnets)
        }
        return [
            replace(
                prepared,
                projected={
                    name: ProjectedTime(shift[at : at + count]) for name, shift in made.items()
                },
            )
            for at in range(0, len(rows), count)
        ]

    def _time(self, timesteps: Tensor, cond: UNetPrepared) -> Tensor:
        """Embed times and what is told beside them: ``(B, time_channels)``, activated."""
        time = self.time_embedding(timestep_embedding(timesteps, self.config.channels[0]))
        return F.silu(time if cond.added is None else time + cond.added)

    def _text(self, cond: UNetCondition) -> Tensor:
        config = self.config
        text = cond.text_hidden
        if text.shape[-1] != config.text_channels:
            raise ValueError(
                f"text_hidden is {text.shape[-1]} wide, but this U-Net's text is "
                f"{config.text_channels} wide"
            )
        return text.to(self.conv_in.weight.dtype)

    def _added(self, cond: UNetCondition) -> Tensor | None:
        config = self.config
        pooled, size_values = cond.text_pooled, cond.sizes
        if config.size_channels is None or self.add_embedding is None:
            if pooled is not None or size_values is not None:
                raise ValueError(
                    "this U-Net is told the text's hidden states alone, as SD 1.x and 2.x: leave "
                    "text_pooled and sizes out"
                )
            return None
        if pooled is None or size_values is None:
            raise ValueError("this U-Net is told text_pooled and sizes as well, as SDXL: give both")
        if pooled.shape[-1] != config.text_pooled_channels or size_values.shape[-1] != NUM_SIZES:
            raise ValueError(
                f"text_pooled of {tuple(pooled.shape)} and sizes of {tuple(size_values.shape)}: "
                f"expected (B, {config.text_pooled_channels}) and (B, {NUM_SIZES})"
            )
        embedded = timestep_embedding(size_values.flatten(), config.size_channels)
        embedded = embedded.unflatten(0, (-1, NUM_SIZES)).flatten(1)  # (B, 6 * size_channels)
        return self.add_embedding(torch.cat([pooled.float(), embedded], dim=1))

    @overload
    def forward(
        self, x: Tensor, timesteps: Tensor, cond: UNetCondition | UNetPrepared
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        cond: UNetCondition | UNetPrepared,
        features: Iterable[str],
    ) -> UNetOutput: ...

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        cond: UNetCondition | UNetPrepared,
        features: Iterable[str] | None = None,
    ) -> Tensor | UNetOutput:
        """Predict.

        Args:
            x: Noised latents, ``(B, 4, h, w)``, of any size.
            timesteps: ``(B,)``, float32 or integers, in the published scale: 0 is hardly noised,
                999 is noise. They may be fractional.
            cond: A condition, or the result of ``prepare`` or ``at_times``.
            features: Names of the ``sites`` whose outputs are returned as well.

        Returns:
            The raw prediction (epsilon in most published checkpoints, v in SD 2.1 of 768 pixels),
            ``(B, 4, h, w)``; with ``features``, a ``UNetOutput``.

        Raises:
            ValueError: The condition or a name in ``features`` is none of this network's.
        """
        wanted = frozenset(() if features is None else features)
        self._check_sites(wanted)
        if isinstance(cond, UNetCondition):
            # Each block asks the text itself: it is called once, and may be recomputed.
            cond = UNetPrepared(self._text(cond), self._added(cond))
        time = self._time(timesteps, cond) if cond.projected is None else cond.projected
        prediction, found = self._denoise(x, time, cond.text, wanted)
        return prediction if features is None else UNetOutput(prediction, found)

    def _denoise(
        self, x: Tensor, time: Time, text: Text, wanted: frozenset[str]
    ) -> tuple[Tensor, Features]:
        """Go down, through the middle and up again."""
        found: Features = {}
        x = self.conv_in(x)
        skips = [x]
        for down in cast("list[DownBlock]", self.down_blocks):
            x, left, seen = down(x, time, text, wanted)
            skips += left
            found |= seen
        if self.mid_block is not None:
            x, seen = self.mid_block(x, time, text, wanted)
            found |= seen
        for up in cast("list[UpBlock]", self.up_blocks):
            own = [skips.pop() for _ in up.resnets]
            height, width = (skips[-1] if skips else x).shape[-2:]
            x, seen = up(x, own, (height, width), time, text, wanted)
            found |= seen
        return self.conv_out(silu(self.conv_norm_out(x))), found

    def _check_sites(self, names: frozenset[str]) -> None:
        for name in names:
            if name not in self.sites:
                like = difflib.get_close_matches(name, self.sites, n=1)
                hint = f"; did you mean {like[0]!r}?" if like else ""
                raise ValueError(f"{name!r} is no site of this U-Net{hint}")
