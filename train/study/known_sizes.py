"""Sizes that a study's steps are counted by: what is known of a network before it is made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cascade.checkpoints.part_files import find_network, find_text
from cascade.config import apply_overrides, from_dict, read_yaml
from cascade.errors import UserError
from cascade.text.picture_encoder import find_preprocessing
from stages.autoencoder_kl import AutoencoderKLConfig
from stages.semantic_compressor import CompressorConfig
from stages.stage_b_v2 import StageBV2Config
from stages.stage_c_v2 import StageCV2Config
from stages.unet.compress import StudentPlan, plan_student
from stages.unet.config import UNetConfig
from train.distill.plans import plan_of, read_recipe
from train.encode import find_compressor
from train.study.published_sizes import (
    CLIP_TOKENS,
    NETWORKS,
    PICTURE_SIDE,
    PICTURE_TOWERS,
    TEXT_TOWERS,
    Tower,
    last_name,
    picture_tower_flops,
)
from train.study.settings import ArmConfig, StepConfig
from train.study.steps import Places
from train.systems.cascade_kd import CascadeKDRun
from train.systems.stage_a import StageARun
from train.systems.stage_b import StageBRun
from train.systems.stage_c import StageCRun
from train.systems.unet import UNetRun

PLACES = Places(Path("HERE"), Path("SHARED"), 0)
"""What ``{here}`` and ``{shared}`` are while nothing is made."""
_RUNS = {
    "stage_a": StageARun,
    "stage_b": StageBRun,
    "stage_c": StageCRun,
    "cascade_kd": CascadeKDRun,
    "unet": UNetRun,
    "unet_kd": UNetRun,
}


def run_of(step: StepConfig) -> Any:
    """Return the configuration of a training as it will be.

    Raises:
        UserError: Its operations are not counted for that kind, or it is not valid.
    """
    assert step.train is not None and step.config is not None
    if step.train not in _RUNS:
        raise UserError(
            f"{step.name}: steps of {step.train} are not counted beforehand; there are "
            + ", ".join(_RUNS)
        )
    return from_dict(_RUNS[step.train], filled_values(step), step.config)


def filled_values(step: StepConfig) -> dict[str, object]:
    """Return what a training is told, as its command line will tell it, with stand-ins for places.

    Raises:
        UserError: A key that the study sets can't be set.
    """
    assert step.config is not None
    values = read_yaml(step.config)
    apply_overrides(values, [f"{key}={PLACES.fill(value)}" for key, value in step.set.items()])
    return values


class Known:
    """Finds the sizes of networks by the names that a run gives them."""

    def __init__(self, arm: ArmConfig) -> None:
        """Take the arm, whose steps make some of them."""
        self._arm = arm

    def sizes(self, name: str, kind: Any) -> Any:
        """Return a network's configuration.

        Raises:
            UserError: Nothing says it.
        """
        made = self._made_by(name)
        if made is not None:
            return self._made(made, name, kind)
        for known in (name, last_name(name)):
            if (known, kind) in NETWORKS:
                return NETWORKS[known, kind]
        return find_network(name, kind).published.config

    def _made_by(self, name: str) -> StepConfig | None:
        """Return the step of the arm below whose folder a name lies."""
        for step in self._arm.steps:
            places = PLACES.of(step)
            told = step.set.get("out")
            out = places.here / step.name if told is None else Path(places.fill(told))
            if out == Path(name) or out in Path(name).parents:
                return step
        return None

    def _made(self, step: StepConfig, name: str, kind: str) -> Any:
        if step.command is not None:
            if step.command.split()[-1] != "make-student":
                raise UserError(f"{name}: nothing says what {step.name} will make there")
            teacher = self.sizes(str(step.set["teacher"]), "unet")
            return plan_student(teacher, read_recipe(str(step.set["recipe"])).recipe).student
        config = run_of(step)
        if kind == "compressor":
            return config.compressor or self.compressor(config.frozen_compressor)
        return self.whole(config).sizes

    def whole(self, config: Any) -> Any:
        """Return a run's configuration with its network's sizes, as ``with_architecture`` does."""
        if config.model is not None or getattr(config, "model_v2", None) is not None:
            return config
        kind = {StageARun: "stage_a", StageBRun: "stage_b", StageCRun: "stage_c", UNetRun: "unet"}
        own = next(name for run, name in kind.items() if isinstance(config, run))
        found = self.sizes(config.init_from, own)
        is_v2 = isinstance(found, (StageBV2Config, StageCV2Config))
        return replace(config, **{"model_v2" if is_v2 else "model": found})

    def compressor(self, name: str) -> CompressorConfig | AutoencoderKLConfig:
        """Return the configuration of a compressor, or of an autoencoder in its place.

        Raises:
            UserError: Nothing says it.
        """
        made = self._made_by(name)
        if made is not None or (name, "compressor") in NETWORKS:
            found: CompressorConfig | AutoencoderKLConfig = self.sizes(name, "compressor")
            return found
        if (name, "autoencoder_kl") in NETWORKS:
            return NETWORKS[name, "autoencoder_kl"]  # type: ignore[no-any-return]
        return find_compressor(name).published.config  # type: ignore[return-value]

    def plan(self, config: UNetRun, teacher: UNetConfig) -> StudentPlan:
        """Return where each module of a student comes from.

        Raises:
            UserError: Nothing says it.
        """
        assert config.distill is not None
        recipe = config.distill.recipe
        made = None if config.init_from is None else self._made_by(config.init_from)
        if recipe is None and made is not None:
            recipe = str(made.set["recipe"])
        return plan_of(config.init_from, recipe, student=config.sizes, teacher=teacher)

    def text(self, name: str, width: int | None = None) -> tuple[float, int, int, int]:
        """Return a caption's operations, its tokens, and the channels of its states.

        Raises:
            UserError: Nothing says it.
        """
        if name in TEXT_TOWERS:
            towers = TEXT_TOWERS[name]
            fitting = [one for one in towers if width in (None, one.channels)]
            if not fitting:
                raise UserError(f"{name}: has no text encoder of {width} channels")
            tower, tokens = fitting[0], CLIP_TOKENS
        else:
            config = json.loads((find_text(name, width).folder / "config.json").read_text())
            values = config.get("text_config") or config
            tower = Tower(
                values["hidden_size"],
                values["num_hidden_layers"],
                values["intermediate_size"],
                config.get("projection_dim"),
            )
            tokens = values["max_position_embeddings"]
        pooled = tower.projection or tower.channels
        return tower.flops(tokens), tokens, tower.channels, pooled


def picture_tower(name: str, side: int | None = None) -> tuple[float, int, int]:
    """Return the operations of CLIP on a picture, its embedding's channels, and its layers.

    Args:
        name: Of the folder or model.
        side: Of the picture; None: the tower's own.
    """
    for known in (name, last_name(name)):
        if known in PICTURE_TOWERS:
            tower = PICTURE_TOWERS[known]
            assert tower.projection is not None
            return (
                picture_tower_flops(tower, side or PICTURE_SIDE),
                tower.projection,
                tower.layers,
            )
    folder = Path(name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values, projection = config["vision_config"], config["projection_dim"]
    own = find_preprocessing(folder).image_size
    tower = Tower(
        values["hidden_size"],
        values["num_hidden_layers"],
        values["intermediate_size"],
        projection,
    )
    patch = values["patch_size"]
    tokens = ((side or own) // patch) ** 2 + 1
    return tower.flops(tokens, 3 * patch * patch), projection, tower.layers
