"""Averages the weights of exported files: the published default of Würstchen v2 is made so.

Networks that were fine-tuned from one another lie in one valley of the loss, and their mean is
often better than either.

Reference: Wortsman et al., 2022, Model soups, arXiv:2203.05482.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cascade.checkpoints.detect import Published
from cascade.checkpoints.files import CLASS_KEY, CONFIG_KEY, atomic_path, sides
from cascade.checkpoints.load import identify
from cascade.checkpoints.part_files import title, weights_hash
from cascade.checkpoints.readers import Opened, open_weights
from cascade.checkpoints.written_tensors import save_tensors
from cascade.errors import UserError
from cascade.tools.written import check_new

AVERAGE_KEY = "averaged_from"
"""Metadata: what a file is the mean of, a JSON list of {file, hash, weight}."""
_OURS = "cascade_"
"""What our metadata of a network begin with; the rest tells how one file was made."""


def average(paths: Sequence[Path], weights: Sequence[float], out: Path) -> None:
    """Write the weighted mean of files of one network, in the first one's layout and formats.

    Fractions are averaged in float32, tensor by tensor; whole numbers, such as the count of a
    batch norm, are the first file's.

    Raises:
        UserError: The weights do not sum to 1, ``out`` is there, or the files do not hold the same
            network: the first difference is named.
    """
    if len(paths) < 2:
        raise UserError("average: name at least two files")
    if len(weights) != len(paths):
        raise UserError(f"--weights: {len(weights)} for {len(paths)} files; one each is needed")
    if not all(map(math.isfinite, weights)) or abs(math.fsum(weights) - 1.0) > 1e-6:
        told = " ".join(f"{weight:g}" for weight in weights)
        raise UserError(f"--weights {told}: they sum to {math.fsum(weights):g}, not to 1")
    check_new(out)
    opened = [_open(path) for path in paths]
    first = opened[0]
    network = identify(first)
    for other in opened[1:]:
        _check_same_network(network, identify(other), first, other)
        _check_same_training(first, other)
        _check_same_tensors(first, other)
    sources = [
        {"file": str(path), "hash": weights_hash(path), "weight": weight}
        for path, weight in zip(paths, weights, strict=True)
    ]
    metadata = {
        key: value
        for key, value in first.metadata.items()
        if key == "format" or key.startswith(_OURS)
    }
    metadata[AVERAGE_KEY] = json.dumps(sources)
    tensors = {key: _mean([one.tensors[key] for one in opened], weights) for key in first.tensors}
    with atomic_path(out) as temporary:
        save_tensors(tensors, temporary, metadata)


def _open(path: Path) -> Opened:
    opened = open_weights(path)
    if len(opened) != 1:
        raise UserError(f"{path}: holds {len(opened)} networks; files of one network are averaged")
    return opened[0]


def _check_same_network(one: Published, other: Published, first: Opened, second: Opened) -> None:
    names = [" ".join(filter(None, (title(p.kind), p.generation))) for p in (one, other)]
    if names[0] != names[1]:
        raise UserError(f"{second.where}: a {names[1]}, but {first.where} is a {names[0]}")
    for field in dataclasses.fields(one.config):
        mine, theirs = (getattr(p.config, field.name) for p in (one, other))
        if mine != theirs:
            raise UserError(
                f"{second.where}: its {field.name} is {theirs}, but {mine} in {first.where}"
            )


def _check_same_training(first: Opened, second: Opened) -> None:
    """Refuse networks that must be sampled in different ways, which their files tell."""
    for key in sorted({*first.metadata, *second.metadata}):
        if not key.startswith(_OURS) or key in (CLASS_KEY, CONFIG_KEY):
            continue
        mine, theirs = first.metadata.get(key), second.metadata.get(key)
        if mine != theirs and None not in (mine, theirs):
            raise UserError(f"{second.where}: its {key} is {theirs}, but {mine} in {first.where}")


def _check_same_tensors(first: Opened, second: Opened) -> None:
    for key, shape in first.shapes.items():
        if key not in second.shapes:
            raise UserError(f"{second.where}: lacks {key}, which {first.where} has")
        if second.shapes[key] != shape:
            found = sides(torch.Size(second.shapes[key]))
            raise UserError(
                f"{second.where}: {key} is {found}, but {sides(torch.Size(shape))} in {first.where}"
            )
    for key in second.shapes:
        if key not in first.shapes:
            raise UserError(f"{second.where}: has {key}, which {first.where} lacks")


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    first = tensors[0]
    if not first.is_floating_point():
        return first.clone()
    mean = torch.zeros(first.shape, dtype=torch.float32)
    for tensor, weight in zip(tensors, weights, strict=True):
        mean.add_(tensor.float(), alpha=weight)
    return mean.to(first.dtype).contiguous()
