"""Sums over ranks for which no host waits for its device.

Lightning's ``log(sync_dist=True)`` and ``strategy.reduce`` put a barrier before each reduction, at
which the host waits until its GPU has done all that it was given; so does reading a sum. What lies
on the device is summed in its queue here, and what lies on the host past it.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from lightning import LightningModule
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

_log = logging.getLogger(__name__)

_MEETING = datetime.timedelta(minutes=2)
_PATIENCE = datetime.timedelta(minutes=30)
"""As torch's own groups on hosts have it."""


class HostGroup:
    """The hosts of a run's ranks, which sum small numbers among themselves every step."""

    def __init__(self) -> None:
        """Begin alone."""
        self._group: dist.ProcessGroup | None = None
        self._device = torch.device("cpu")

    def open(self, device: torch.device) -> None:
        """Meet the other ranks; all of them must come, and a second call does nothing.

        Args:
            device: That the ranks' own group works on; it serves where hosts do not find each
                other, which a cluster's network may not let them.
        """
        if num_ranks() == 1 or self._group is not None:
            return
        met = torch.ones((), device=device)
        try:
            group = dist.new_group(backend="gloo", timeout=_MEETING)
            dist.all_reduce(torch.zeros(1), group=group)
            _set_pg_timeout(_PATIENCE, group)  # the first rank may draw pictures for a while
        except RuntimeError as error:
            _log.warning("the ranks' hosts do not find each other (%s): GLOO_SOCKET_IFNAME?", error)
            met.zero_()
        dist.all_reduce(met, op=dist.ReduceOp.MIN)
        if bool(met):
            self._group = group
        else:  # slower: each step waits for the device
            self._group, self._device = dist.group.WORLD, device

    def summed(self, values: Sequence[int]) -> list[int]:
        """Return the sums over ranks of each value; all ranks must ask."""
        if self._group is None:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.int64, device=self._device)
        dist.all_reduce(numbers, group=self._group)
        return [int(number) for number in numbers.tolist()]


def num_ranks() -> int:
    """Return the processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(part: Tensor) -> Tensor:
    """Return the sum over ranks; all of them must ask.

    Args:
        part: A rank's, on its device. It is left as it is.
    """
    if num_ranks() == 1:
        return part
    whole = part.detach().clone()
    dist.all_reduce(whole)
    return whole


def log_means(module: LightningModule, values: Mapping[str, Tensor]) -> None:
    """Log scalars as their means over ranks, in one reduction; ``loss`` is shown beside the bar.

    Args:
        module: Whose step it is.
        values: Name -> scalar; the same names on all ranks.
    """
    packed = torch.stack([value.detach().float() for value in values.values()])
    means = summed(packed) / num_ranks()  # (values,)
    for name, mean in zip(values, means.unbind(), strict=True):
        module.log(name, mean, prog_bar=name == "loss")
