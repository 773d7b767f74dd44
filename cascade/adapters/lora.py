"""LoRA: low-rank updates of layers, trained beside frozen weights or merged into them.

An updated layer computes with ``W + strength * alpha / rank * up @ down``. Only ``down`` and ``up``
are trained; merged, the update costs nothing when pictures are made.

Reference: Hu et al., 2021, arXiv:2106.09685, section 4.1; for convolutions Yeh et al., 2023,
LyCORIS, arXiv:2309.14859, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""All four projections of every attention of a U-Net."""
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The same of a text encoder."""
DEFAULT = "default"
"""Name of an adapter that is given none."""

Layer = nn.Linear | nn.Conv2d
_HELD = "lora"
"""Where a layer holds its updates, by the name of their adapter."""


@dataclass(frozen=True)
class LoraConfig:
    """What is trained of a network, and how strongly it counts."""

    rank: int = 16
    """Rows of ``down`` and columns of ``up``."""
    alpha: float = 16.0
    """The update is multiplied by ``alpha / rank``."""
    targets: tuple[str, ...] = UNET_TARGETS
    """Ends of the paths of the layers that are updated, such as "to_q" or "attn2.to_k": linear
    layers and convolutions."""

    def __post_init__(self) -> None:
        """Refuse what trains nothing."""
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; at least 1 is needed")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha is {self.alpha}; a number above 0 is needed")
        if not self.targets:
            raise ValueError('targets is empty; name layers, as in targets=("to_q", "to_v")')


@dataclass(frozen=True)
class LowRank:
    """The update of one layer: plain tensors, as in a file."""

    down: Tensor
    """(rank, in), of a convolution (rank, in, kh, kw)."""
    up: Tensor
    """(out, rank), of a convolution (out, rank, 1, 1)."""
    alpha: float
    """The update is ``alpha / rank * up @ down``."""

    @property
    def rank(self) -> int:
        """Rows of ``down``."""
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """Return what is added to the weight, in its shape, in float32."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.alpha / self.rank * product).unflatten(1, self.down.shape[1:])


Updates = Mapping[str, LowRank]
"""Updates of a network's layers, by path."""


def layers_of(network: nn.Module) -> dict[str, Layer]:
    """Return the layers that an update can be of, by path: not those of updates themselves."""
    return {
        path: layer
        for path, layer in network.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }


def lora_shapes(layer: Layer, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of ``down`` and ``up`` for a layer."""
    out, *rest = layer.weight.shape
    return (rank, *rest), (out, rank, *[1] * (len(rest) - 1))


# Training


class LoraLayer(nn.Module):
    """The trainable update of one layer, whose input it reads and to whose output it is added.

    ``down`` and ``up`` are float32, whatever the number format of the layer.
    """

    def __init__(self, layer: Layer, update: LowRank) -> None:
        """Take the layer, which is not held, and where training starts."""
        super().__init__()
        device = layer.weight.device
        self.down = nn.Parameter(update.down.detach().to(device, torch.float32, copy=True))
        self.up = nn.Parameter(update.up.detach().to(device, torch.float32, copy=True))
        self.alpha = update.alpha
        self.strength = 1.0
        """How much of the update is added; 0 is none of it."""
        self.walk: tuple[Any, Any, Any] | None = None
        """Stride, padding and dilation of a convolution."""
        if isinstance(layer, nn.Conv2d):
            if layer.groups != 1 or layer.padding_mode != "zeros":
                raise ValueError(f"a low-rank update of {layer} is not known here")
            self.walk = layer.stride, layer.padding, layer.dilation

    def update(self) -> LowRank:
        """Return the update, whose tensors are this layer's own."""
        return LowRank(self.down.detach(), self.up.detach(), self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the layer's output, in float32 or as autocast has it.

        Args:
            x: What the layer reads, ``(..., in)``, of a convolution ``(B, in, H, W)``.
        """
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.down.dtype)
        if self.walk is None:
            update = F.linear(F.linear(x, self.down), self.up)
        else:
            stride, padding, dilation = self.walk
            update = F.conv2d(F.conv2d(x, self.down, None, stride, padding, dilation), self.up)
        return self.strength * self.alpha / len(self.down) * update


class Adapter:
    """One adapter of a network: its updates of layers, by path."""

    def __init__(self, network: nn.Module, name: str, layers: Mapping[str, LoraLayer]) -> None:
        """Take what is attached to a network already; see ``attach_lora`` and ``adapter_of``."""
        self._network = network
        self.name = name
        self.layers = dict(layers)

    def parameters(self) -> list[nn.Parameter]:
        """Return what an optimizer trains."""
        return [one for layer in self.layers.values() for one in layer.parameters()]

    def set_strength(self, strength: float) -> None:
        """Choose how much of the adapter counts: 0 is none of it, 1 all."""
        for layer in self.layers.values():
            layer.strength = strength

    def updates(self) -> dict[str, LowRank]:
        """Return copies of the updates, which a file or ``merge_lora`` takes."""
        return {
            path: LowRank(one.down.detach().clone(), one.up.detach().clone(), one.alpha)
            for path, one in self.layers.items()
        }

    def detach(self) -> None:
        """Take the adapter off the network; others stay."""
        for path in self.layers:
            layer = self._network.get_submodule(path)
            held = cast(nn.ModuleDict, getattr(layer, _HELD))
            del held[self.name]
            if not held:
                delattr(layer, _HELD)
                for number, hook in list(layer._forward_hooks.items()):
                    if hook is _add_updates:
                        del layer._forward_hooks[number]


def attach_lora(
    network: nn.Module,
    config: LoraConfig,
    *,
    name: str = DEFAULT,
    generator: torch.Generator | None = None,
) -> Adapter:
    """Attach a new adapter, which changes nothing yet, and freeze everything that is no adapter.

    The paths and the weights of the network's own layers stay as they are; what is attached to
    ``to_q`` is at ``to_q.lora.NAME.down`` and ``.up``.

    Args:
        network: A U-Net, or a text encoder's model.
        config: Rank, alpha and layers.
        name: Tells it from others on the same network.
        generator: Of the first values, on the CPU; None is torch's own.

    Raises:
        ValueError: If a target is no layer's, naming some that are, or is of something else than
            linear layers and convolutions; if no layer is as wide as the rank.
    """
    chosen = _targeted(network, config.targets)
    widest = max(min(len(layer.weight), layer.weight[0].numel()) for layer in chosen.values())
    if config.rank > widest:
        raise ValueError(
            f"rank is {config.rank}, but no layer that it updates has a rank above {widest}"
        )
    updates = {}
    for path, layer in chosen.items():
        down_shape, up_shape = lora_shapes(layer, config.rank)
        # As torch starts a linear layer; drawn on the CPU, the start is the same on every device.
        down = torch.empty(down_shape)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        updates[path] = LowRank(down, torch.zeros(up_shape), config.alpha)
    return attach_updates(network, updates, name=name)


def attach_updates(network: nn.Module, updates: Updates, *, name: str = DEFAULT) -> Adapter:
    """Attach given updates, such as a file's, to be trained on; else as ``attach_lora``.

    Raises:
        ValueError: If one does not fit its layer, or the network has an adapter of that name.
    """
    if not name.isidentifier():
        raise ValueError(f"{name!r} is no name of an adapter; use letters, digits and _")
    own = layers_of(network)
    for path, update in updates.items():
        _check_fits(path, own.get(path), update)
        if name in getattr(own[path], _HELD, {}):
            raise ValueError(f"{path} has an adapter {name!r} already; give this one another name")
    attached = {path: LoraLayer(own[path], update) for path, update in updates.items()}
    trained = {id(one) for adapter in adapters_of(network) for one in adapter.parameters()}
    for parameter in network.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)
    for path, one in attached.items():
        layer = own[path]
        if not hasattr(layer, _HELD):
            layer.add_module(_HELD, nn.ModuleDict())
            layer.register_forward_hook(_add_updates)
        cast(nn.ModuleDict, getattr(layer, _HELD))[name] = one
    return Adapter(network, name, attached)


def adapters_of(network: nn.Module) -> list[Adapter]:
    """Return all adapters that are attached to a network."""
    found: dict[str, dict[str, LoraLayer]] = {}
    for path, layer in network.named_modules():
        held = layer._modules.get(_HELD)
        if isinstance(held, nn.ModuleDict):
            for name, one in held.items():
                if isinstance(one, LoraLayer):
                    found.setdefault(name, {})[path] = one
    return [Adapter(network, name, layers) for name, layers in found.items()]


def adapter_of(network: nn.Module, name: str = DEFAULT) -> Adapter:
    """Return the adapter of a name.

    Raises:
        ValueError: If there is none.
    """
    adapters = {one.name: one for one in adapters_of(network)}
    if name not in adapters:
        raise ValueError(f"no adapter {name!r} is attached; there is {', '.join(adapters) or None}")
    return adapters[name]


def lora_state(network: nn.Module, name: str = DEFAULT) -> dict[str, Tensor]:
    """Return an attached adapter's tensors by PEFT's names, ``PATH.lora_A.weight`` and ``lora_B``.

    Raises:
        ValueError: If no such adapter is attached.
    """
    state = {}
    for path, update in adapter_of(network, name).updates().items():
        state[f"{path}.lora_A.weight"] = update.down
        state[f"{path}.lora_B.weight"] = update.up
    return state


def _targeted(network: nn.Module, targets: Sequence[str]) -> dict[str, Layer]:
    """Return the layers whose paths end with a target."""
    chosen = {}
    own = layers_of(network)
    paths = {path: layer for path, layer in network.named_modules() if path}
    for target in targets:
        ending = {
            path: layer
            for path, layer in paths.items()
            if path == target or path.endswith(f".{target}")
        }
        if not ending:
            known = sorted({_ending(path) for path in own})
            raise ValueError(f"targets: no layer's path ends with {target!r}; {', '.join(known)}")
        for path, layer in ending.items():
            if path not in own:
                what = type(layer).__name__
                raise ValueError(f"targets: {path} is a {what}, no linear layer or convolution")
            chosen[path] = own[path]
    # In the network's own order, whatever that of the targets.
    return {path: layer for path, layer in own.items() if path in chosen}


def _ending(path: str) -> str:
    """Return the last name of a path, with the one before it where that is a number."""
    *before, last = path.split(".")
    return f"{before[-1]}.{last}" if last.isdecimal() and before else last


def _check_fits(path: str, layer: Layer | None, update: LowRank) -> None:
    if layer is None:
        raise ValueError(f"{path}: no linear layer or convolution of this network")
    shapes = tuple(update.down.shape), tuple(update.up.shape)
    if shapes != lora_shapes(layer, update.rank):
        raise ValueError(
            f"{path}: an update of {shapes[0]} and {shapes[1]}, but "
            f"{' and '.join(map(str, lora_shapes(layer, update.rank)))} fit"
        )


def _add_updates(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Add what is attached to a layer to its output, in the output's number format."""
    for one in cast(nn.ModuleDict, getattr(layer, _HELD)).values():
        output = output + one(inputs[0]).to(output.dtype)
    return output


# Merging


class Merged:
    """Weights that hold updates; ``undo`` gives the layers their own ones back, to the bit."""

    def __init__(self, changed: Sequence[tuple[Layer, nn.Parameter]]) -> None:
        """Take each layer with the parameter that it had."""
        self._changed = [(layer, own, layer.weight) for layer, own in changed]

    def undo(self) -> None:
        """Put the layers' own parameters back: the very tensors, so that nothing is rounded.

        Raises:
            ValueError: If the weights were replaced since, as by another merge: undo that first.
        """
        if any(layer.weight is not merged for layer, _, merged in self._changed):
            raise ValueError("other weights were put in since; undo the later merge first")
        for layer, own, _ in self._changed:
            layer.weight = own
        self._changed = []


def merge_lora(
    network: nn.Module,
    updates: Sequence[tuple[Updates, float]],
    *,
    dtype: torch.dtype | None = None,
) -> Merged:
    """Put updates into a network's weights.

    Sums are float32 and rounded once, however many updates a layer has.

    Args:
        network: The network, on any device.
        updates: Updates, and the strength of each; those of strength 0 are left out.
        dtype: Number format of the merged weights; None: each layer's own.

    Returns:
        What undoes it; it keeps the weights as they were.

    Raises:
        ValueError: If an update does not fit its layer, or its sum is not finite in ``dtype``.
    """
    own = layers_of(network)
    changed = []
    merged = {}
    for path, parts in _by_layer(updates):
        for update, _ in parts:
            _check_fits(path, own.get(path), update)
        weight = own[path].weight
        total = weight.detach().float()
        for update, strength in parts:
            total = total + strength * update.delta().to(total.device)
        merged[path] = total.to(dtype or weight.dtype)
        if not bool(merged[path].isfinite().all()):
            name = str(merged[path].dtype).removeprefix("torch.")
            raise ValueError(f"{path}: its weight with the update is not finite in {name}")
    for path, value in merged.items():
        layer = own[path]
        changed.append((layer, cast(nn.Parameter, layer.weight)))
        layer.weight = nn.Parameter(value, requires_grad=layer.weight.requires_grad)
    return Merged(changed)


def _by_layer(
    updates: Sequence[tuple[Updates, float]],
) -> Iterator[tuple[str, list[tuple[LowRank, float]]]]:
    """Yield each layer's updates with their strengths."""
    found: dict[str, list[tuple[LowRank, float]]] = {}
    for one, strength in updates:
        for path, update in one.items() if strength else ():
            found.setdefault(path, []).append((update, strength))
    yield from found.items()
