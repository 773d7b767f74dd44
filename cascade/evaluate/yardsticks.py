"""The networks that a protocol measures with: loaded where a metric needs them, and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cascade.checkpoints.files import file_hash
from cascade.errors import UserError
from cascade.evaluate.features import (
    Clip,
    FeatureNetwork,
    clip_features,
    load_clip,
    load_inception,
)
from cascade.evaluate.lpips import Lpips, PatchDistance
from cascade.evaluate.protocol import BY_FEATURES, PROMPTED, Protocol


@dataclass(frozen=True)
class Perceptual:
    """What measures "lpips"."""

    label: str
    name: str
    weights: str
    distance: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Yardsticks:
    """The networks that a protocol measures with; None where its metrics need none."""

    features: FeatureNetwork | None = None
    clip: Clip | None = None
    perceptual: Perceptual | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def load_yardsticks(
    protocol: Protocol,
    *,
    features: str | Path | None = None,
    clip: str | Path | None = None,
    lpips: Path | None = None,
    device: torch.device | None = None,
) -> Yardsticks:
    """Load the networks that a protocol's metrics need, and no others.

    Args:
        protocol: The protocol.
        features: Inception's weights, or a CLIP's folder or name on the hub.
        clip: A CLIP's folder or name on the hub.
        lpips: LPIPS' trunk.
        device: Where they run.

    Raises:
        UserError: If one is not given, cannot be loaded, or is not the protocol's.
    """
    device = device or torch.device("cpu")
    wanted = set(protocol.metrics)
    on_clip = bool(wanted & (PROMPTED | {"mmd"})) or (
        "lpips" in wanted and protocol.perceptual == "clip"
    )
    judge = None
    if on_clip:
        if clip is None:
            raise UserError(f"{protocol.name} measures with a CLIP, {protocol.clip.name}: --clip")
        judge = load_clip(clip, protocol.clip.name, device)
        protocol.clip.check(judge.weights, str(clip))
    network = None
    if wanted & BY_FEATURES:
        same = judge if features == clip and protocol.features.kind == "clip" else None
        network = _load_features(protocol, features, device, same)
    perceptual = _load_perceptual(protocol, judge, lpips, device) if "lpips" in wanted else None
    return Yardsticks(network, judge, perceptual, device)


def _load_features(
    protocol: Protocol, place: str | Path | None, device: torch.device, loaded: Clip | None
) -> FeatureNetwork:
    wanted = protocol.features
    if place is None:
        raise UserError(f"{protocol.name} takes its features from {wanted.name}: --features")
    if wanted.kind == "inception":
        network = load_inception(Path(place), protocol.resize, device)
    else:
        clip = loaded or load_clip(place, wanted.name, device)
        network = clip_features(clip.scorer, wanted.name, clip.weights)
    wanted.check(network.weights, str(place))
    return network


def _load_perceptual(
    protocol: Protocol, clip: Clip | None, path: Path | None, device: torch.device
) -> Perceptual:
    if protocol.perceptual == "clip":
        assert clip is not None, "loaded above"
        distance = PatchDistance(clip.scorer.picture_encoder)
        label = f"perceptual distance ({clip.name}), no LPIPS"
        return Perceptual(label, clip.name, clip.weights, distance)
    if path is None:
        raise UserError(f"{protocol.name} measures {protocol.perceptual}: give --lpips, its trunk")
    network = Lpips.from_file(path)
    if protocol.perceptual != f"lpips_{network.trunk}":
        raise UserError(f"{path}: {network.trunk}, but the protocol measures {protocol.perceptual}")
    weights = file_hash(path)
    if protocol.perceptual_weights and not weights.startswith(protocol.perceptual_weights):
        raise UserError(
            f"{path}: its weights have the hash {weights}, but the protocol measures with "
            f"{protocol.perceptual_weights}"
        )
    name = f"LPIPS ({network.trunk})"
    return Perceptual(name, name, weights, network.to(device))
