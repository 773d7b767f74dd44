"""CUDA graphs: a network's pass as one launch, where launching its kernels takes the time.

At batch 1 a GPU waits for the host: a pass of Stage C is a thousand kernels, each shorter than its
launch. A graph is a recording of them over fixed tensors. It is made when a pass first meets its
shapes; from then on the pass's inputs are copied to where the recording reads, it is replayed, and
its result copied away.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from cascade.compiled import check_stays, is_compiled
from cascade.errors import UserError

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""Takes a pass over fixed tensors; returns what runs it again, and where its result then lies."""

_MOST_SHAPES = 8
"""Of a network; the one that was last asked for longest ago is forgotten first."""
_WARM_UP = 3


def check_graphs(device: torch.device, offload: str | None, vram: float | None) -> None:
    """Refuse graphs where there are none, or where weights come and go.

    Raises:
        UserError: If it is so.
    """
    if device.type != "cuda":
        raise UserError(
            f"--cuda-graphs needs a CUDA GPU, and pictures are made on {device.type}; leave it out"
        )
    check_stays("--cuda-graphs", offload, vram)


class GpuCapture:
    """Records passes on a GPU; all of its graphs share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        """Take the device."""
        self._device = device
        self._pool: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Run a pass until nothing is set up or compiled any more, then record it.

        Reference: PyTorch's notes on CUDA, "CUDA Graphs".
        """
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # A progress bar's thread may ask CUDA for something meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                out = run()
        return graph.replay, out


@dataclass
class _Pass:
    """A recorded pass."""

    given: list[Tensor]
    """What it reads, in the order of the leaves of its inputs."""
    last: list[Callable[[], Tensor | None]]
    """Which tensors were copied there last."""
    replay: Callable[[], object]
    out: Tensor


@dataclass
class _Recordings:
    """Passes of one network, as long as its weights are where they were."""

    weights: tuple[Hashable, ...]
    passes: OrderedDict[Hashable, _Pass] = dataclasses.field(default_factory=OrderedDict)


class CudaGraphs:
    """Passes of networks, recorded by network and shapes."""

    def __init__(self, capture: Capture) -> None:
        """Take what records a pass: a ``GpuCapture``."""
        self._capture = capture
        self._networks: WeakKeyDictionary[nn.Module, _Recordings] = WeakKeyDictionary()

    def of(self, network: nn.Module) -> Callable[[Tensor, Tensor, Any], Tensor]:
        """Return a network's pass for one walk: ``(x, t, cond) -> prediction``.

        Weights that were written over in place count at once. Where they lie elsewhere than before
        passes are recorded anew, and so they are where blocks were compiled since.

        Args:
            network: The network; conditions are dataclasses of tensors and of what holds some.

        Raises:
            UserError: Weights are not all on one device.
        """
        tensors = [*network.parameters(), *network.buffers()]
        if len({tensor.device for tensor in tensors}) > 1 or any(one.is_meta for one in tensors):
            raise UserError(
                "CUDA graphs need all weights to stay on the device; place the model without "
                "offload and vram"
            )
        modes = is_compiled(network), torch.is_inference_mode_enabled()
        weights = (*modes, *(tensor.data_ptr() for tensor in tensors))
        known = self._networks.get(network)
        if known is None or known.weights != weights:
            known = self._networks[network] = _Recordings(weights)
        passes = known.passes
        return lambda x, t, cond: self._run(network, passes, (x, t, cond))

    def _run(
        self, network: nn.Module, passes: OrderedDict[Hashable, _Pass], inputs: tuple[Any, ...]
    ) -> Tensor:
        leaves: list[Tensor] = []
        shape = _flat(inputs, leaves, {})
        key = (shape, tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves))
        known = passes.pop(key, None)
        if known is None:
            known = self._record(network, inputs, leaves)
            if len(passes) >= _MOST_SHAPES:
                passes.popitem(last=False)
        else:
            # What all steps share is there from the first; x and t may be written over in place.
            fresh = [
                row
                for row, (leaf, last) in enumerate(zip(leaves, known.last, strict=True))
                if leaf is not last() or leaf is inputs[0] or leaf is inputs[1]
            ]
            there, here = [known.given[row] for row in fresh], [leaves[row] for row in fresh]
            torch._foreach_copy_(there, here)
            known.last = [ref(leaf) for leaf in leaves]
        passes[key] = known
        known.replay()
        return known.out.clone()

    def _record(
        self, network: nn.Module, inputs: tuple[Any, ...], leaves: Sequence[Tensor]
    ) -> _Pass:
        given = [leaf.clone() for leaf in leaves]  # rows that were expanded are written out
        fixed = _filled(inputs, {id(leaf): one for leaf, one in zip(leaves, given, strict=True)})
        try:
            replay, out = self._capture(lambda: network(*fixed))
        except RuntimeError as error:
            raise UserError(
                "CUDA graphs: a pass could not be recorded here; leave them out: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error
        return _Pass(given, [ref(leaf) for leaf in leaves], replay, out)


def _flat(tree: Any, leaves: list[Tensor], known: dict[int, int]) -> Hashable:
    """Gather a tree's tensors, each once, and return what is left of the tree."""
    if isinstance(tree, Tensor):
        if id(tree) not in known:
            known[id(tree)] = len(leaves)
            leaves.append(tree)
        return known[id(tree)]
    if isinstance(tree, tuple):
        return (type(tree), *(_flat(one, leaves, known) for one in tree))
    if isinstance(tree, Mapping):
        return (type(tree), *((name, _flat(one, leaves, known)) for name, one in tree.items()))
    if dataclasses.is_dataclass(tree):
        return (type(tree), _flat(_fields(tree), leaves, known))
    return (type(tree), tree)


def _filled(tree: Any, by_id: dict[int, Tensor]) -> Any:
    """Return a tree with other tensors in the same places."""
    if isinstance(tree, Tensor):
        return by_id[id(tree)]
    if isinstance(tree, tuple):
        filled = [_filled(one, by_id) for one in tree]
        return type(tree)(*filled) if hasattr(tree, "_fields") else tuple(filled)
    if isinstance(tree, Mapping):
        return {name: _filled(one, by_id) for name, one in tree.items()}
    if dataclasses.is_dataclass(tree):
        return type(tree)(**_filled(_fields(tree), by_id))  # type: ignore[misc]
    return tree


def _fields(tree: Any) -> dict[str, Any]:
    return {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
