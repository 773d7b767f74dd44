"""What a run starts from: the weights of ``init_from``, in any layout that the pipeline loads.

The ``model`` section may be left out then: the sizes are those of the weights.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from cascade.checkpoints.autoencoders import trunk_from_torchvision
from cascade.checkpoints.detect import Kind
from cascade.checkpoints.files import CLASS_KEY, assign_strictly, check_finite_weights
from cascade.checkpoints.found import FoundNetwork
from cascade.checkpoints.load import build
from cascade.checkpoints.part_files import find_network, title
from cascade.checkpoints.readers import open_weights
from cascade.config import from_dict, to_dict
from cascade.errors import UserError
from stages.semantic_compressor import SemanticCompressor
from stages.stage_b_v2 import StageBV2Config
from stages.stage_c_v2 import StageCV2Config
from train.callbacks.checkpoints import newest_checkpoint
from train.fit import Prepared
from train.losses.denoising import DiffusionConfig, learned_diffusion
from train.noted import CONFIG_FILE, read_noted

_log = logging.getLogger(__name__)

R = TypeVar("R")
_FREE = (
    "dropout",
    "stochastic_depth",
    "scale",
    "shift",
    "input_fraction",
    "pixel_mean",
    "pixel_std",
)
"""Fields of a network's configuration that a run may set otherwise than the weights' own."""


@dataclass(frozen=True)
class Architecture:
    """Sizes of a run's network: one of its configuration's sections."""

    section: str
    """"model", or "model_v2" for the networks of Würstchen v2."""
    config: Any


def architecture_of(config: Any) -> Architecture | None:
    """Return the section that says the network's sizes; None: neither is given."""
    for section in ("model", "model_v2"):
        found = getattr(config, section, None)
        if found is not None:
            return Architecture(section, found)
    return None


def check_architecture(config: Any) -> None:
    """Refuse a run of no network, or of two.

    Raises:
        ValueError: Naming the keys.
    """
    sections = [name for name in ("model", "model_v2") if hasattr(config, name)]
    given = [name for name in sections if getattr(config, name) is not None]
    if len(given) > 1:
        raise ValueError("model is given and model_v2 too; name the sizes of one network")
    if not given and config.init_from is None:
        raise ValueError(
            f"{' or '.join(sections)} is missing: name the network's sizes, or an init_from whose "
            "sizes it takes"
        )


def with_architecture(config: R, kind: Kind, *, resume: bool) -> R:
    """Return a run's configuration with the sizes of its network.

    Where the configuration names none they are those of ``init_from``; a run that goes on has
    noted them, and may go on without the file.

    Raises:
        UserError: The weights are not there, or are another network's.
    """
    given: Any = config
    if architecture_of(config) is not None:
        return config
    out = Path(given.run.out)
    if resume and newest_checkpoint(out, tidy=False) is not None:
        noted = read_noted(out).values
        sections = {name: noted[name] for name in ("model", "model_v2") if noted.get(name)}
        whole = {**to_dict(given), **sections}
        return from_dict(type(config), whole, str(out / CONFIG_FILE))
    found = find_network(given.init_from, kind)
    if kind == "stage_a" and CLASS_KEY not in found.opened.metadata:
        raise UserError(
            f"init_from {given.init_from}: a published Stage A does not say its latents' scale; "
            "give the model section, whose scale is 0.43 (Stable Cascade) or 0.3764 (Würstchen v2)"
        )
    sizes = found.published.config
    section = "model_v2" if isinstance(sizes, (StageBV2Config, StageCV2Config)) else "model"
    try:
        return dataclasses.replace(given, **{section: sizes})
    except ValueError as error:
        raise UserError(f"init_from {given.init_from}: {error}") from error


def start(
    network: nn.Module,
    name: str | None,
    kind: Kind,
    prepared: Prepared,
    section: str = "model",
    taught: DiffusionConfig | None = None,
) -> None:
    """Give a fresh run the weights of its ``init_from``; one that goes on has its own.

    Args:
        network: A network of the run.
        name: Its ``init_from``.
        kind: Which network it is.
        prepared: The run's folder.
        section: The section of the run's configuration that says the network's sizes.
        taught: What a stage learns to predict here; it is said where the weights learned another.
    """
    if name is not None and prepared.newest is None:
        found = start_from(network, name, kind, section)
        if taught is not None:
            _tell_of_unlearning(found, name, taught)


def _tell_of_unlearning(found: FoundNetwork, name: str, taught: DiffusionConfig) -> None:
    """Warn that a run teaches a network another prediction or path than it has learned."""
    learned = learned_diffusion(found.opened.metadata, str(found.path))
    differing = {
        key: learned[key]
        for key in ("prediction", "schedule", "zero_terminal_snr")
        if learned[key] != getattr(taught, key)
    }
    if differing:
        ours = ", ".join(f"{key} {getattr(taught, key)}" for key in differing)
        theirs = ", ".join(f"{key}: {value}" for key, value in differing.items())
        _log.warning(
            "init_from %s was not trained with %s, as this run is: it learns anew much of what it "
            "knows; to go on as it was trained, set diffusion: {%s}",
            *(name, ours, theirs),
        )


def start_from(network: nn.Module, name: str, kind: Kind, section: str = "model") -> FoundNetwork:
    """Copy weights into a fresh network of the same sizes, strictly; return where they are from.

    Args:
        network: A network of the run.
        name: As ``find_network`` takes it.
        kind: Which network it is.
        section: The section of the run's configuration that says its sizes, for messages.

    Raises:
        UserError: The weights are not there, not finite, or of other sizes: the first that differ.
    """
    found = find_network(name, kind)
    _check_sizes(found, network, name, kind, section)
    weights = build(found.opened, found.published)
    check_finite_weights(weights, f"init_from {name}")
    network.load_state_dict(weights.state_dict())
    return found


def _check_sizes(
    found: FoundNetwork, network: nn.Module, name: str, kind: Kind, section: str
) -> None:
    theirs: Any = found.published.config
    ours: Any = network.config
    if type(theirs) is not type(ours):
        fitting = "model_v2" if section == "model" else "model"
        raise UserError(
            f"init_from {name}: a {title(kind)} of {found.published.generation}, which {section} "
            f"does not describe; give its sizes as {fitting}, or leave {section} out"
        )
    # Nothing but a diffusers config or our own metadata tells the number of heads.
    tells_heads = CLASS_KEY in found.opened.metadata or bool(found.opened.declared)
    differing = [
        f"{field.name} is {getattr(theirs, field.name)} there and {getattr(ours, field.name)} here"
        for field in dataclasses.fields(ours)
        if field.name not in _FREE
        and (field.name != "num_heads" or tells_heads)
        and getattr(theirs, field.name) != getattr(ours, field.name)
    ]
    if differing:
        raise UserError(
            f"init_from {name}: another {title(kind)} than {section} says: "
            f"{'; '.join(differing[:3])}; leave {section} out to take the sizes of the weights"
        )


def start_compressor_from(compressor: SemanticCompressor, name: str) -> None:
    """Copy a compressor's weights, or the trunk alone of torchvision's EfficientNetV2.

    Raises:
        UserError: The weights are not there, are neither, or are of other sizes.
    """
    path = Path(name)
    opened = open_weights(path) if path.is_file() else []
    if len(opened) != 1 or "features.0.0.weight" not in opened[0].tensors:
        start_from(compressor, name, "compressor", "compressor")
        return
    try:
        state = trunk_from_torchvision(opened[0].tensors, compressor.config.stages)
    except UserError as error:
        raise UserError(f"compressor_init_from {name}: {error}") from error
    copied = {
        key: value.float().clone() if value.is_floating_point() else value.clone()
        for key, value in state.items()
    }
    assign_strictly(compressor.trunk, copied, f"compressor_init_from {name}")
