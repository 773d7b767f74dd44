"""Weights of one naming to another's: a table of links, followed in both directions, strictly.

A table is an iterable of links, in our network's own order; whoever publishes a network gets one
file of such tables. Nothing may be missing, left over or of another shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cascade.checkpoints.files import first_keys, sides, sizes
from cascade.checkpoints.mapped import StoredTensors
from cascade.errors import UserError

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Link:
    """Tensors of ours that hold the same numbers as tensors of theirs."""

    ours: tuple[str, ...]
    """Names of ours; joined along the first axis they are the joined tensors of theirs."""
    theirs: tuple[str, ...]
    """Names of theirs."""
    our_parts: tuple[int, ...] = (1,)
    """Relative heights of ours, as (1, 2) for a query beside a fused key and value."""
    their_parts: tuple[int, ...] = (1,)
    """Relative heights of theirs."""
    their_leading_ones: int = 0
    """Axes of size 1 that theirs have before the axes of ours, of one tensor each."""
    their_trailing_ones: int = 0
    """The same after the axes of ours: 2 where a linear layer of ours is a convolution there."""

    transposed: bool = False
    """Whether rows of ours are columns there, of one tensor each."""

    def __post_init__(self) -> None:
        """Refuse what is not followed: another form of tensors that are joined."""
        ones = self.their_leading_ones or self.their_trailing_ones
        assert not (ones or self.transposed) or len(self.ours) == len(self.theirs) == 1
        assert not (ones and self.transposed)


Table = Iterable[Link]


# What tables are made of


def same(ours: str, theirs: str) -> Link:
    """Link a tensor to one of the same shape."""
    return Link((ours,), (theirs,))


def layer(ours: str, theirs: str) -> Iterator[Link]:
    """Link weight and bias of a layer."""
    for name in ("weight", "bias"):
        yield same(f"{ours}.{name}", f"{theirs}.{name}")


def batch_norm(ours: str, theirs: str, affine: bool = True) -> Iterator[Link]:
    """Link a batch norm, its statistics included."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for name in (("weight", "bias") if affine else ()) + statistics:
        yield same(f"{ours}.{name}", f"{theirs}.{name}")


def by_module(ours: Iterable[str], modules: Mapping[str, str]) -> Iterator[Link]:
    """Link tensors to those of the same shape in a module of another name.

    Args:
        ours: Names of ours.
        modules: Paths of ours to paths of theirs; of several that lead to a tensor, the longest
            one tells. What is below them has the same name on both sides.
    """
    for name in ours:
        module, rest = name, ""
        while module not in modules:
            module, _, last = module.rpartition(".")
            assert module, f"{name} is in none of the modules"
            rest = f".{last}{rest}"
        yield same(name, modules[module] + rest)


# Following them


def to_ours(state: State, table: Table, network: nn.Module | None = None) -> dict[str, Tensor]:
    """Give published weights our names and shapes.

    Args:
        state: The published weights.
        table: Links of every tensor of both sides.
        network: Ours, on any device, meta too; if given, every shape must fit it.

    Raises:
        UserError: Naming the first five missing, unexpected and misshapen tensors.
    """
    links = tuple(table)
    shapes = None if network is None else _their_shapes(_shapes(network.state_dict()), links)
    steps = [_Step(link.theirs, link.ours, link.our_parts, _without_ones(link)) for link in links]
    return _converted(state, steps, shapes)


def to_theirs(state: State, table: Table, network: nn.Module | None = None) -> dict[str, Tensor]:
    """Give our weights the published names and shapes; the inverse of ``to_ours``.

    Args:
        state: Our weights.
        table: Links of every tensor of both sides.
        network: Ours, on any device, meta too; if given, every shape must fit it.

    Raises:
        UserError: Naming the first five missing, unexpected and misshapen tensors.
    """
    shapes = None if network is None else _shapes(network.state_dict())
    steps = [_Step(link.ours, link.theirs, link.their_parts, _with_ones(link)) for link in table]
    return _converted(state, steps, shapes)


@dataclass(frozen=True)
class _Step:
    """A link, seen in one direction."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    target_parts: tuple[int, ...]
    reshape: Callable[[Tensor], Tensor]


def _converted(
    state: State, steps: Sequence[_Step], shapes: Mapping[str, torch.Size] | None
) -> dict[str, Tensor]:
    wanted = [source for step in steps for source in step.sources]
    known = set(wanted)
    assert len(known) == len(wanted), "a table names a tensor twice"
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in known]
    found = sizes(state)
    misshapen = [
        f"{key} ({sides(found[key].shape)} instead of {sides(shapes[key])})"
        for key in (wanted if shapes is not None else ())
        if shapes is not None and key in found and found[key].shape != shapes[key]
    ]
    _refuse(missing=missing, unexpected=unexpected, misshapen=misshapen)
    converted: dict[str, Tensor] = {}
    for step in steps:
        try:
            converted.update(_follow(state, step))
        except (RuntimeError, ValueError):
            misshapen += [f"{key} ({sides(found[key].shape)})" for key in step.sources]
    _refuse(misshapen=misshapen)
    return converted


def _follow(state: State, step: _Step) -> dict[str, Tensor]:
    if len(step.sources) == 1:
        joined = step.reshape(state[step.sources[0]])
    elif isinstance(state, StoredTensors):
        joined = state.joined(step.sources)
    else:
        joined = torch.cat([state[source] for source in step.sources])
    if len(step.targets) == 1:
        return {step.targets[0]: joined}
    unit, rest = divmod(len(joined), sum(step.target_parts))
    if rest:
        raise ValueError(f"a first axis of {len(joined)} has no parts {step.target_parts}")
    parts = joined.split([unit * part for part in step.target_parts])
    return dict(zip(step.targets, parts, strict=True))


def _without_ones(link: Link) -> Callable[[Tensor], Tensor]:
    leading, trailing = link.their_leading_ones, link.their_trailing_ones

    def reshape(tensor: Tensor) -> Tensor:
        if link.transposed:
            return tensor.T.contiguous()
        kept = tensor.shape[leading : tensor.ndim - trailing]
        if tensor.shape != (*(1,) * leading, *kept, *(1,) * trailing):
            raise ValueError(f"{sides(tensor.shape)} has no {leading} and {trailing} axes of 1")
        return tensor.reshape(kept) if leading or trailing else tensor

    return reshape


def _with_ones(link: Link) -> Callable[[Tensor], Tensor]:
    def reshape(tensor: Tensor) -> Tensor:
        if link.transposed:
            return tensor.T.contiguous()
        shape = _shape_with_ones(link, tensor.shape)
        return tensor if shape == tensor.shape else tensor.reshape(shape)

    return reshape


def _shape_with_ones(link: Link, ours: torch.Size) -> torch.Size:
    if link.transposed:
        return torch.Size(reversed(ours))
    return torch.Size((*(1,) * link.their_leading_ones, *ours, *(1,) * link.their_trailing_ones))


def _refuse(**complaints: Sequence[str]) -> None:
    """Raise if there is any complaint; the first five of each kind are named."""
    told = []
    for kind, keys in complaints.items():
        if keys:
            told.append(f"{len(keys)} {kind}: {first_keys(keys)}")
    if told:
        raise UserError(f"weights do not fit the configuration: {'; '.join(told)}")


def _their_shapes(ours: Mapping[str, torch.Size], links: Sequence[Link]) -> dict[str, torch.Size]:
    """Return the shapes of theirs that hold ours."""
    known = dict.fromkeys(name for link in links for name in link.ours)
    _refuse(
        missing=[name for name in known if name not in ours],
        unexpected=[name for name in ours if name not in known],
    )
    theirs = {}
    for link in links:
        first = ours[link.ours[0]]
        if len(link.ours) == len(link.theirs) == 1:
            theirs[link.theirs[0]] = _shape_with_ones(link, first)
            continue
        rows = sum(ours[name][0] for name in link.ours)
        for name, part in zip(link.theirs, link.their_parts, strict=True):
            theirs[name] = torch.Size((rows * part // sum(link.their_parts), *first[1:]))
    return theirs


def _shapes(state: State) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in state.items()}
