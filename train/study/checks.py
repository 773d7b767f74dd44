"""What can be known to be wrong before anything is trained: files, places, names of figures."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from cascade.checkpoints.hub import is_hub_name
from cascade.config import did_you_mean, from_dict, not_among
from cascade.errors import UserError
from cascade.evaluate.__main__ import DEMO_CLIP
from cascade.evaluate.metrics import asked_of
from cascade.evaluate.protocol import PROMPTED, REFERRED, Protocol, load_protocol
from cascade.evaluate.yardsticks import load_yardsticks
from cascade.pipelines.placement import pick_device
from train.__main__ import kinds
from train.study.known_sizes import filled_values
from train.study.settings import ArmConfig, JudgeConfig, StepConfig, StudyConfig

_FIGURES: Mapping[str, tuple[str, ...]] = {
    "precision_recall": ("precision", "recall"),
    "retrieval": ("retrieval_top_1", "retrieval_top_5"),
}
"""Of metrics that have several, or of another name."""


def check_study(config: StudyConfig) -> None:
    """Refuse a study whose arms could be trained and not be judged.

    Raises:
        UserError: Naming the key or the file.
    """
    protocol = check_judge(config.judge, "judge")
    known = figure_names(protocol)
    for name in config.headline:
        if name not in known:
            hint = did_you_mean(name, known)
            raise UserError(
                f"headline: {name} is no figure of {config.judge.protocol}, which has "
                f"{', '.join(known)}{hint}"
            )
    pick_device(config.device)
    for arm in config.arms:
        files = [step.config for step in arm.steps] + [arm.model.config]
        for file in files:
            if file is not None and not Path(file).is_file():
                raise UserError(f"{arm.name}: {file}: no such configuration; check the path")
        for step in arm.steps:
            _check_step(arm, step)


def _check_step(arm: ArmConfig, step: StepConfig) -> None:
    """Refuse a training that its own command would refuse, and a command that is none.

    Raises:
        UserError: Naming the arm.
    """
    if step.train is None:
        assert step.command is not None
        module = step.command.split()[0]
        try:
            known = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            known = False
        if not known:
            raise UserError(f"{arm.name}: {step.name}: there is no command {step.command!r}")
        return
    if step.train not in kinds():
        raise not_among(f"{arm.name}: {step.name}: no training", step.train, kinds())
    run_class, _ = kinds()[step.train]
    from_dict(
        run_class, filled_values(step), f"{arm.name}: {step.config} with what the study sets in it"
    )


def check_judge(judge: JudgeConfig, where: str) -> Protocol:
    """Refuse a protocol that can't be read, and places that are not there; return the protocol.

    What the study makes itself, below ``{shared}``, is not looked for.

    Args:
        judge: The places.
        where: Its key, for the message.

    Raises:
        UserError: Naming the key or the file.
    """
    protocol = load_protocol(judge.protocol)
    for key in ("real", "prompts", "lpips"):
        place = getattr(judge, key)
        if place is not None and "{" not in place and not Path(place).exists():
            raise UserError(f"{where}.{key}: {place} is not there; check the path")
    for key, group in (("real", REFERRED), ("prompts", PROMPTED)):
        names = ", ".join(name for name in protocol.metrics if name in group)
        given = getattr(judge, key) is not None or (key == "prompts" and protocol.prompts.inline)
        if names and not given:
            raise UserError(f"{where}.{key}: missing; {judge.protocol} measures {names}")
    _check_yardsticks(judge, protocol)
    own = judge.prompts is not None and "{" not in judge.prompts
    if own or (judge.prompts is None and protocol.prompts.inline):
        asked_of(protocol, protocol.read_prompts(Path(judge.prompts) if judge.prompts else None))
    return protocol


def _check_yardsticks(judge: JudgeConfig, protocol: Protocol) -> None:
    """Load what a protocol measures with, once, where all of it is given and here.

    Raises:
        UserError: It can't be loaded, is not the protocol's, or is not given.
    """
    clip, features = judge.clip or DEMO_CLIP, judge.features
    if features is None and protocol.features.kind == "clip":
        features = clip
    places = [one for one in (features, clip, judge.lpips) if one is not None]
    if any("{" in place or (is_hub_name(place) and not Path(place).exists()) for place in places):
        return  # made by the study, or fetched when it is needed
    load_yardsticks(
        protocol,
        features=features,
        clip=clip,
        lpips=None if judge.lpips is None else Path(judge.lpips),
    )


def figure_names(protocol: Protocol) -> list[str]:
    """Return the names of the figures that a protocol measures."""
    found: list[str] = []
    for metric in protocol.metrics:
        if metric == "attributes":
            found += [f"attribute_{one.field}" for one in protocol.attributes]
        else:
            found += _FIGURES.get(metric, (metric,))
    return found
