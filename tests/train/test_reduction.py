"""Ranks that sum what lies on the device, and what lies on the host; and hosts that do not meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from train.reduction import HostGroup, log_means, num_ranks, summed


class Logged:
    """A system that keeps what it logs."""

    def __init__(self) -> None:
        self.values: dict[str, tuple[float, bool]] = {}

    def log(self, name: str, value: torch.Tensor, prog_bar: bool) -> None:
        self.values[name] = (float(value), prog_bar)


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("no route to host")


def begin(rank: int, folder: str) -> HostGroup:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    return HostGroup()


def rank_of_two(rank: int, folder: str) -> None:
    hosts = begin(rank, folder)
    hosts.open(torch.device("cpu"))
    group = hosts._group
    hosts.open(torch.device("cpu"))
    assert hosts._group is group is not None and group is not dist.group.WORLD
    assert hosts.summed([1, rank, 2**40]) == [2, 1, 2**41]
    part = torch.tensor([1.0 + rank])
    assert summed(part).item() == 3.0 and part.item() == 1.0 + rank
    logged = Logged()
    loss = torch.tensor(2.0 * rank, requires_grad=True)
    log_means(logged, {"loss": loss, "mse": torch.tensor(rank, dtype=torch.bfloat16)})  # type: ignore[arg-type]
    assert logged.values == {"loss": (1.0, True), "mse": (0.5, False)}
    dist.destroy_process_group()


def test_two_ranks_sum_on_devices_and_on_hosts(tmp_path: Path) -> None:
    mp.spawn(rank_of_two, (str(tmp_path),), nprocs=2)


def failing_rank(rank: int, folder: str) -> None:
    hosts = begin(rank, folder)
    dist.new_group = refuse  # type: ignore[assignment]
    hosts.open(torch.device("cpu"))
    assert hosts._group is dist.group.WORLD
    assert hosts.summed([3, rank]) == [6, 1]
    dist.destroy_process_group()


def test_hosts_that_do_not_find_each_other_ask_by_the_device(tmp_path: Path) -> None:
    mp.spawn(failing_rank, (str(tmp_path),), nprocs=2)


def test_one_rank_alone_asks_nobody() -> None:
    hosts = HostGroup()
    hosts.open(torch.device("cpu"))
    part = torch.ones(2)
    assert num_ranks() == 1 and summed(part) is part and hosts.summed([4, 5]) == [4, 5]
    logged = Logged()
    log_means(logged, {"loss": torch.tensor(1.5)})  # type: ignore[arg-type]
    assert logged.values == {"loss": (1.5, True)}
