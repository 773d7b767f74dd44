"""torch.compile by region: each kind of block once, however many there are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from cascade.errors import UserError

COMPILE_BACKEND = "inductor"
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_MOST_VARIANTS = 64


def blocks_of(network: nn.Module) -> Iterator[nn.Module]:
    """Yield a network's blocks: the outermost entries of its lists that are no lists themselves."""
    for child in network.children():
        yield from _entries(child) if isinstance(child, _CONTAINERS) else blocks_of(child)


def _entries(container: nn.Module) -> Iterator[nn.Module]:
    for child in container.children():
        if isinstance(child, _CONTAINERS):
            yield from _entries(child)
        elif next(child.parameters(), None) is not None:
            yield child


def compile_blocks(network: nn.Module) -> None:
    """Compile each block by itself: blocks of one kind share their code, however many they are.

    It happens when a block first runs. Another size of its inputs is compiled once more, for all
    sizes. A graph break is an error and not a slower block. ``Module.compile`` adds no
    ``_orig_mod`` to the keys, and copies of the network are not compiled.
    """
    # Blocks differ by level, and count together because all are called through one function.
    torch._dynamo.config.recompile_limit = _MOST_VARIANTS
    for block in blocks_of(network):
        if not type(block).__module__.startswith("torch."):  # a single layer has nothing to fuse
            block.compile(fullgraph=True, backend=COMPILE_BACKEND)


def is_compiled(network: nn.Module) -> bool:
    """Return whether some part of a network is compiled."""
    return any(
        isinstance(one, torch._dynamo.OptimizedModule) or one._compiled_call_impl is not None
        for one in network.modules()
    )


def check_stays(option: str, offload: str | None, vram: float | None) -> None:
    """Refuse an option that is not for networks whose weights come and go.

    Raises:
        UserError: If they do.
    """
    if offload not in (None, "none") or vram is not None:
        raise UserError(
            f"{option} needs all weights to stay on the device; leave --offload and --vram out"
        )
