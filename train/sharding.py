"""FSDP2: networks cut over devices, and checkpoints that are one process's all the same.

Lightning's ``ModelParallelStrategy`` gives the process group and the mesh; a system's
``configure_model`` cuts its networks. What a run saves is gathered to the first rank, so that a
checkpoint is one file, written, verified and kept by ``RunCheckpoints``, and a run may go on with
another number of devices or without FSDP. The first rank's CPU memory must hold the checkpoint: 16
bytes a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from cascade.errors import UserError
from train.settings import OptimConfig, RunConfig


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices, with checkpoints of whole tensors in torch's own layout.

    Lightning's own single-file checkpoint numbers the optimizer's parameters otherwise than torch
    does: a run without FSDP could not go on from it.
    """

    def __init__(self, devices: int) -> None:
        """Take the number of devices of all machines together."""
        super().__init__(
            data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    @property
    def data_mesh(self) -> DeviceMesh:
        """The ranks that the weights are cut over: all."""
        return self.device_mesh["data_parallel"]

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Let Lightning hand the optimizer's states to this class."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole weights on the first rank, nothing on the others."""
        assert self.lightning_module is not None, "fit() comes first"
        whole = gathered(self.lightning_module.state_dict())
        return whole if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the whole states on the first rank, nothing on the others."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        whole = gathered(inner.state_dict())
        return whole if self.is_global_zero else {}

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Map the file: each rank reads its part of every tensor, and the pages are shared.

        Whatever Lightning asks for, no code in the file is run.
        """
        return torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give each rank its part of the weights."""
        assert self.lightning_module is not None, "fit() comes first"
        own = self.lightning_module.state_dict()
        parts = {
            key: part_like(value, own[key]) if key in own else value
            for key, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(parts, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each rank its part of the optimizers' states."""
        states = [
            _parts_of_states(state, optimizer)
            for state, optimizer in zip(
                checkpoint["optimizer_states"], self.optimizers, strict=True
            )
        ]
        ParallelStrategy.load_optimizer_state_dict(self, {"optimizer_states": states})


def shard_network(network: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Cut each block, then what is left of the network, over the ranks of a mesh.

    Weights stay float32: under autocast they are cast where they are used, as without FSDP, and
    the steps are those of one process up to rounding. All ranks must hold equal weights: they come
    from the run's seed or from one file.
    """
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def check_can_shard(system: LightningModule, run: RunConfig, optim: OptimConfig) -> None:
    """Refuse what FSDP would do wrong.

    Raises:
        UserError: Naming what works instead.
    """
    use = "; use run.strategy ddp"
    if not system.automatic_optimization:
        raise UserError(f"run.strategy fsdp: this network is stepped by two optimizers{use}")
    if any(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in system.modules()):
        raise UserError(
            f"run.strategy fsdp: batch norms would see each device's part of the batch alone{use}"
        )
    if any(one.dim() == 0 for one in system.parameters()):
        raise UserError(f"run.strategy fsdp: a number by itself can't be cut into parts{use}")
    if run.precision == "16-mixed":
        raise UserError("run.strategy fsdp: run.precision is 16-mixed; use bf16-mixed or 32-true")
    if optim.offload or optim.name == "adamw8bit":
        option = "optim.offload" if optim.offload else "optim.name adamw8bit"
        raise UserError(
            f"run.strategy fsdp: {option} is for one device's whole states, which fsdp cuts over "
            "the devices already; use optim.name adamw or muon"
        )


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor; a plain tensor is whole on every rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_like(whole: Tensor, own: Tensor) -> Tensor:
    """Cut a whole tensor as ``own`` is cut, on the device of ``own``; nothing is sent."""
    if not isinstance(own, DTensor):
        return whole
    whole = whole.to(own.device)
    return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)


def cut_like(part: Tensor, own: Tensor) -> Tensor:
    """Return the tensor whose part this rank has, cut as ``own`` is; nothing is sent."""
    if not isinstance(own, DTensor):
        return part
    return DTensor.from_local(
        part.to(own.to_local().device),
        own.device_mesh,
        own.placements,
        run_check=False,
        shape=own.shape,
        stride=own.stride(),
    )


def gathered(tree: Any) -> Any:
    """Return nested containers with whole CPU tensors in place of parts; all ranks must take part.

    Tensors that are not cut stay as they are.
    """
    return tree_map(
        lambda one: one.full_tensor().cpu() if isinstance(one, DTensor) else one,
        tree,
        is_leaf=lambda one: isinstance(one, Tensor),
    )


def _parts_of_states(whole: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Cut the states that are as large as their parameter; the others are numbers."""
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    numbers = [number for group in whole["param_groups"] for number in group["params"]]
    states: dict[int, dict[str, Any]] = {}
    for number, parameter in zip(numbers, parameters, strict=True):
        states[number] = {
            name: part_like(value, parameter)
            if isinstance(value, Tensor) and value.shape == parameter.shape
            else value
            for name, value in whole["state"].get(number, {}).items()
        }
    kept = {number: state for number, state in states.items() if state}
    return {"state": kept, "param_groups": whole["param_groups"]}
