"""Blocks of Stage B and Stage C whose outputs can be asked for: what distillation compares.

A block is named as the module is, ``down_blocks.LEVEL.BLOCK`` or ``up_blocks.INDEX.BLOCK``. As in
the U-Nets, blocks are asked for in the call and returned by it: no hooks, no state that outlives
the call, and gradients flow whether a block is recomputed, compiled or neither.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BlockSite:
    """A block whose output can be asked for."""

    name: str
    """Path of the module."""
    channels: int
    """Width of its output, which is (B, C, h, w)."""
    level: int
    """Of the network, the finest first."""


@dataclass(frozen=True)
class BlockOutput:
    """A prediction with the blocks' outputs that were asked for."""

    prediction: Tensor
    """What the network returns by itself."""
    features: dict[str, Tensor]
    """Outputs by name of the block, (B, C, h, w); of a block that runs repeatedly, the last."""


class BlockTaps:
    """Collects outputs within one forward pass."""

    def __init__(self, wanted: Iterable[str], known: Iterable[str]) -> None:
        """Take the names asked for.

        Raises:
            ValueError: One is no block of the network.
        """
        self.wanted = frozenset(wanted)
        self.found: dict[str, Tensor] = {}
        for name in sorted(self.wanted - set(known)):
            like = difflib.get_close_matches(name, list(known), n=1)
            hint = f"; did you mean {like[0]!r}?" if like else ""
            raise ValueError(f"{name!r} is no block of this network{hint}")

    def see(self, where: str, level: int, block: int, output: Tensor) -> None:
        """Keep a block's output if it is asked for."""
        name = f"{where}.{level}.{block}"
        if name in self.wanted:
            self.found[name] = output


def block_sites(
    widths: Sequence[int], down_blocks: Sequence[int], up_blocks: Sequence[int]
) -> dict[str, BlockSite]:
    """Return every block by name in running order.

    Args:
        widths: Of each level, the finest first.
        down_blocks: Blocks of each level on the way down.
        up_blocks: Blocks of each level on the way up, the deepest level first.
    """
    found = [
        BlockSite(f"down_blocks.{level}.{block}", widths[level], level)
        for level, blocks in enumerate(down_blocks)
        for block in range(blocks)
    ]
    last = len(widths) - 1
    found += [
        BlockSite(f"up_blocks.{index}.{block}", widths[last - index], last - index)
        for index, blocks in enumerate(up_blocks)
        for block in range(blocks)
    ]
    return {site.name: site for site in found}
