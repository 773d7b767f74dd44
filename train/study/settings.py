"""What a study compares: arms of steps, under one budget, judged by one protocol."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass, field
from typing import Literal

Unit = Literal["device_seconds", "samples", "flops"]
DECIDED = ("run.out", "run.seed", "run.max_steps", "run.export_at_steps", "data.seed")
"""Keys of a training that the study sets."""
Option = bool | int | float | str | None
PLACES = ("here", "shared", "seed", "weights")
"""What ``{...}`` may name in a step: the arm's folder of this seed and budget, the folder of what
is made once for the whole study, the seed, and (in ``model`` alone) the folder of the weights that
the last training had exported at the moment that is judged."""


@dataclass(frozen=True)
class BudgetConfig:
    """What every arm may spend."""

    unit: Unit
    """``device_seconds`` of training and of the arm's commands; ``samples`` seen in all trainings;
    ``flops`` of all trainings."""
    amounts: tuple[float, ...]
    """One study for each."""
    teacher: Literal["apart", "counted"] = "apart"
    """What a teacher takes, in steps with ``cost: teacher`` and in trainings that ask it, is told
    in a column of its own, or is the arm's."""

    def __post_init__(self) -> None:
        """Refuse budgets that buy nothing."""
        if not self.amounts or not all(0 < amount < math.inf for amount in self.amounts):
            raise ValueError(f"amounts is {self.amounts}; give one or more positive numbers")
        # Folders are named by six digits.
        if len({f"{amount:g}" for amount in self.amounts}) != len(self.amounts):
            raise ValueError(f"amounts is {self.amounts}; each is to be given once")
        if self.teacher == "counted" and self.unit == "samples":
            raise ValueError(
                "teacher is counted but unit is samples: a teacher has none; count device_seconds "
                "or flops, or tell its cost apart"
            )


@dataclass(frozen=True)
class StepConfig:
    """One thing that an arm does: a training, or another command of this repository."""

    name: str
    """Names its folder, its log and its line of the plan."""
    train: str | None = None
    """Kind of training, as ``python -m train`` takes it."""
    command: str | None = None
    """Module and words of another command, such as ``train.distill make-student``."""
    config: str | None = None
    """Its ``--config``."""
    share: float = 0.0
    """Part of the budget that a training gets."""
    set: dict[str, Option] = field(default_factory=dict)
    """Options: of a training any key of its configuration, of a command those of its ``--help``
    (true: the option alone)."""
    cost: Literal["arm", "teacher", "none"] = "arm"
    """Who pays for a command: the arm, the teacher, or nobody (what every arm is given)."""
    shared: bool = False
    """Made once, for all seeds and budgets; ``{here}`` is ``{shared}`` then."""
    resumable: bool = False
    """A command that goes on where it was stopped; another begins again, and what it had left at
    its ``out`` is removed first."""
    trial: dict[str, Option] = field(default_factory=dict)
    """Options in place of those of ``set`` while a step is tried for the plan, such as ``limit:
    16`` of a million pictures to draw."""
    trial_part: float = 1.0
    """Which part of the command ``trial`` makes of it; its seconds count for the whole by that."""

    def __post_init__(self) -> None:
        """Refuse steps that are nothing, or two things."""
        if (self.train is None) == (self.command is None):
            raise ValueError(f"step {self.name!r}: give train or command")
        if not self.name or not set(self.name) <= set(string.ascii_letters + string.digits + "_-"):
            raise ValueError(f"step {self.name!r}: a name is letters, digits, - and _")
        if self.train is not None and self.config is None:
            raise ValueError(f"step {self.name!r}: a training has a config")
        if self.train is not None and self.shared:
            raise ValueError(
                f"step {self.name!r}: a training is not shared; train it before the study, and "
                "name its weights under given"
            )
        if self.train is not None and self.trial:
            raise ValueError(
                f"step {self.name!r}: trial is for commands; a training is tried as is"
            )
        if not 0 < self.trial_part <= 1 or (self.trial_part < 1) != bool(self.trial):
            raise ValueError(
                f"step {self.name!r}: trial_part is {self.trial_part}; a trial is a part in (0, 1) "
                "of its command, and without one it is 1"
            )
        decided = [key for key in self.set if self.train is not None and key in DECIDED]
        if decided:
            raise ValueError(f"step {self.name!r}: {decided[0]} is the study's to decide")
        if (self.share > 0) != (self.train is not None) or not 0 <= self.share <= 1:
            raise ValueError(
                f"step {self.name!r}: share is {self.share}; a training has a share in (0, 1], "
                "a command none"
            )


@dataclass(frozen=True)
class ModelConfig:
    """How what an arm has trained becomes a model folder."""

    command: Literal["train.assemble", "train.assemble_unet", "train.assemble_latent"]
    config: str
    set: dict[str, Option] = field(default_factory=dict)


@dataclass(frozen=True)
class ArmConfig:
    """One way to a model."""

    name: str
    steps: tuple[StepConfig, ...]
    """In order; the last training is judged while it goes on."""
    model: ModelConfig
    description: str = ""
    """A sentence for the report."""
    given: tuple[str, ...] = ()
    """Weights that it starts with and does not pay for, files or names on the hub; the report tells
    what they had cost, where their files say it."""

    def __post_init__(self) -> None:
        """Refuse arms whose budget is not all of it, and names that meet."""
        names = [step.name for step in self.steps]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"arm {self.name!r}: two steps are named {twice[0]}")
        trainings = [step for step in self.steps if step.train is not None]
        if not trainings or self.steps[-1] is not trainings[-1]:
            raise ValueError(f"arm {self.name!r}: its last step must be a training")
        total = sum(step.share for step in trainings)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"arm {self.name!r}: the shares of its trainings sum to {total:g}")
        given: list[tuple[dict[str, Option], tuple[str, ...]]] = [
            ({**step.set, **step.trial}, PLACES[:-1]) for step in self.steps
        ]
        given.append((self.model.set, PLACES))
        for options, allowed in given:
            for key, value in options.items():
                for place in _places(value):
                    if place not in allowed:
                        raise ValueError(
                            f"arm {self.name!r}: {key} names {{{place}}}; there are "
                            + ", ".join(f"{{{one}}}" for one in allowed)
                        )

    @property
    def last(self) -> StepConfig:
        """The training that is judged."""
        return self.steps[-1]


@dataclass(frozen=True)
class JudgeConfig:
    """How models are judged: a protocol, and the places of what it measures with."""

    protocol: str
    """YAML file."""
    real: str | None = None
    """Shards or folder of the real pictures that models are held to; ``{shared}`` is the folder of
    what the study made once."""
    prompts: str | None = None
    """Where the protocol's prompts are, unless it holds them itself."""
    features: str | None = None
    """The protocol's feature network."""
    clip: str | None = None
    """The protocol's CLIP; None: the demonstration's."""
    lpips: str | None = None
    """LPIPS' trunk."""
    launcher: tuple[str, ...] = ()
    """What starts the drawing of a model's pictures on several devices, as the study's ``launcher``
    does for trainings; the first process measures."""

    def __post_init__(self) -> None:
        """Refuse places that are not known."""
        for name in ("real", "prompts", "features", "clip", "lpips"):
            for place in _places(getattr(self, name)):
                if place != "shared":
                    raise ValueError(f"{name} names {{{place}}}; there is {{shared}}")


@dataclass(frozen=True)
class StudyConfig:
    """Arms under one budget."""

    name: str
    budget: BudgetConfig
    arms: tuple[ArmConfig, ...]
    judge: JudgeConfig
    seeds: tuple[int, ...] = (0, 1, 2)
    evaluate_at: tuple[float, ...] = (0.5, 1.0)
    """Fractions of the budget at which every arm is judged."""
    description: str = ""
    """What is asked, in a sentence or two, for the report."""
    headline: tuple[str, ...] = ()
    """Figures of the protocol that the report's curves show; empty: all that it has."""
    launcher: tuple[str, ...] = ()
    """What starts a training in place of this Python: ``[torchrun, --nproc_per_node, "8"]`` or
    ``[srun, python]``. Trainings say ``run.devices`` and ``run.num_nodes`` themselves."""
    calibration_steps: int = 8
    """Steps of each training that are tried to learn what one takes."""
    price_per_device_hour: float | None = None
    """Of one device, in any currency; None: no money in the report."""
    grid_prompts: int = 8
    """Prompts of the protocol whose pictures the report shows."""
    device: str = "auto"
    """Where models are judged."""

    def __post_init__(self) -> None:
        """Refuse what could not be told apart or judged."""
        if not self.arms:
            raise ValueError("arms is empty; give two or more")
        # Some file systems do not tell letters' cases apart.
        names = [arm_folder(arm.name).lower() for arm in self.arms]
        for arm, folder in zip(self.arms, names, strict=True):
            if not folder.strip(".") or not arm.name.isprintable():
                raise ValueError(f"an arm is named {arm.name!r}; its folder needs letters")
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(f"two arms are named {self.arms[index].name!r}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}; give each once")
        shared: dict[str, StepConfig] = {}
        for step in (step for arm in self.arms for step in arm.steps if step.shared):
            if shared.setdefault(step.name, step) != step:
                raise ValueError(f"two shared steps are named {step.name!r} and are not the same")
        outside = [one for one in self.evaluate_at if not 0 < one <= 1]
        alike = len({f"{one:g}" for one in self.evaluate_at}) != len(self.evaluate_at)
        if outside or alike or list(self.evaluate_at) != sorted(self.evaluate_at):
            raise ValueError(f"evaluate_at is {self.evaluate_at}; fractions rise, within (0, 1]")
        if not self.evaluate_at or self.evaluate_at[-1] != 1.0:
            raise ValueError(f"evaluate_at is {self.evaluate_at}; its last is 1, the whole budget")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds is {self.seeds}; a seed is 0 or more")
        price = self.price_per_device_hour
        if price is not None and not 0 <= price < math.inf:
            raise ValueError(f"price_per_device_hour is {price}; a price is 0 or more")
        if self.grid_prompts < 0:
            raise ValueError(f"grid_prompts is {self.grid_prompts}; 0 or more rows are shown")
        if self.calibration_steps < 4:
            raise ValueError(f"calibration_steps is {self.calibration_steps}; 4 is the least")


def arm_folder(name: str) -> str:
    """Return a name for an arm's folder."""
    return "".join(one if one.isalnum() or one in "-." else "_" for one in name)


def _places(value: Option) -> list[str]:
    if not isinstance(value, str):
        return []
    return [place for _, place, _, _ in string.Formatter().parse(value) if place is not None]
