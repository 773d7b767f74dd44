"""The bytes that code takes on a device, found by running it on the meta device.

There tensors have a size and no content; those that are alive at once are followed. Kernels'
private workspaces and the allocator's rounding are not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes of meta tensors that are alive at once while ``run`` runs."""
    live = _LiveBytes()
    with torch.inference_mode(), _FlashAttention(), live:
        run()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Follows the storages of meta tensors from the operation that made them to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for value in tree_iter((args, kwargs)):  # not made here: weights, counted elsewhere
            if isinstance(value, Tensor) and value.is_meta:
                self._seen.add(value.untyped_storage()._cdata)
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.is_meta:
                self._follow(value.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._end, key, size)

    def _end(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


class _FlashAttention(TorchFunctionMode):
    """Attention as GPUs compute it: the scores of all pairs are never in memory at once.

    Reference: Dao et al., 2022, FlashAttention, arXiv:2205.14135.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))
