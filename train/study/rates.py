"""What a compression study compares: one arm written once, at several sizes of Stage C's latents.

Its file is that of a budget study in which ``arm`` is a template and ``rates`` says what is filled
in; ``arms`` are others that stand beside the curve, such as the baseline of equal bytes.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from cascade.config import apply_overrides, did_you_mean, from_dict, read_yaml
from cascade.errors import UserError
from stages.semantic_compressor import CompressorConfig
from train.study.plan import values_of
from train.study.settings import PLACES, ArmConfig, JudgeConfig, Option, StudyConfig

RATE_KEYS = ("name", "grid", "channels", "stride", "fraction", "cell")
"""What the template may name of each rate, beside the rate's own ``values``."""


@dataclass(frozen=True)
class RateConfig:
    """One size of Stage C's latents."""

    grid: int
    """Cells along one side."""
    channels: int = 16
    """Channels of a cell."""
    values: dict[str, Option] = field(default_factory=dict)
    """What else the template names; every rate gives the same."""

    def __post_init__(self) -> None:
        """Refuse latents of nothing, and names that are taken."""
        if min(self.grid, self.channels) < 1:
            raise ValueError(f"{self.name}: grid and channels must be at least 1")
        taken = [key for key in self.values if key in (*RATE_KEYS, *PLACES)]
        if taken:
            raise ValueError(f"{self.name}: values.{taken[0]} is the study's own name")

    @property
    def name(self) -> str:
        """Names its arm."""
        return f"{self.grid}x{self.grid}x{self.channels}"


@dataclass(frozen=True)
class ReconstructionConfig:
    """How reconstructions are judged: pictures through compressor, Stage B and Stage A."""

    protocol: str
    """YAML file; its metrics ask for no prompts."""
    real: str
    """Shards or folder of the pictures, the originals; ``{shared}`` is what the study made once."""
    count: int = 256
    """Pictures that are reconstructed, drawn by their keys; the reference is all of them."""

    def judge(self, other: JudgeConfig) -> JudgeConfig:
        """Return it as a study's judge, with the networks of the other one."""
        return JudgeConfig(self.protocol, self.real, None, other.features, other.clip, other.lpips)

    def __post_init__(self) -> None:
        """Refuse too few pictures, and places that are not known."""
        if self.count < 2:
            raise ValueError(f"count is {self.count}; sets of at least 2 pictures are compared")
        JudgeConfig(self.protocol, self.real)


@dataclass(frozen=True)
class SweepConfig:
    """The rates of a study, and what they are judged by beside the budget study's protocol."""

    rates: tuple[RateConfig, ...]
    image_size: int
    """Side of the pictures, in pixels."""
    reconstruction: ReconstructionConfig
    strides: tuple[int, ...] = (32,)
    """Strides of the compressors that the template knows. A grid takes the largest that reaches it,
    and ``compressor.input_fraction``, the resize before the compressor, does the rest."""

    def __post_init__(self) -> None:
        """Refuse rates that are no curve, or that no compressor makes."""
        if len(self.rates) < 2:
            raise ValueError("rates: two or more make a curve")
        names = [rate.name for rate in self.rates]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"rates: {twice[0]} is there twice")
        if not self.strides or min(self.strides) < 2:
            raise ValueError(f"strides is {self.strides}; a compressor's stride is at least 2")
        known = set(self.rates[0].values)
        for rate in self.rates:
            stride_of(rate.grid, self)
            if set(rate.values) != known:
                key = sorted(known ^ set(rate.values))[0]
                raise ValueError(f"rates: some give values.{key} and {rate.name} or others do not")


@dataclass(frozen=True)
class CompressionConfig:
    """A compression study: the budget study that it expands to, and its rates."""

    study: StudyConfig
    sweep: SweepConfig

    @property
    def on_curve(self) -> dict[str, RateConfig]:
        """The rates by the names of their arms; all other arms stand beside the curve."""
        return {rate.name: rate for rate in self.sweep.rates}


def stride_of(grid: int, sweep: SweepConfig) -> int:
    """Return the largest stride whose compressor makes a grid without enlarging the picture.

    Raises:
        ValueError: None does.
    """
    fitting = [stride for stride in sweep.strides if grid * stride <= sweep.image_size]
    if not fitting:
        finest = sweep.image_size // min(sweep.strides)
        raise ValueError(
            f"rates: a {grid}x{grid} grid of pictures of {sweep.image_size} px needs a stride of "
            f"{sweep.image_size // grid or 'less than 1'}; with stride {min(sweep.strides)}, the "
            f"least of strides, {finest}x{finest} is the finest"
        )
    return max(fitting)


def load_compression(path: str | Path, overrides: Sequence[str] = ()) -> CompressionConfig:
    """Read a compression study and expand its template to an arm for each rate.

    Raises:
        UserError: For an unknown key, a rate that can't be, or a template that names what is not
            there; in one line.
    """
    values, where = read_yaml(path), str(path)
    apply_overrides(values, overrides)
    template = values.pop("arm", None)
    if not isinstance(template, Mapping):
        raise UserError(f"{where}: arm: missing; it is the template of an arm, with {{rate}} keys")
    own = {one.name for one in fields(SweepConfig)}
    sweep = from_dict(SweepConfig, {key: values.pop(key) for key in own & values.keys()}, where)
    beside = values.pop("arms", None) or []
    if not isinstance(beside, list):
        raise UserError(f"{where}: arms: expected a list of arms that stand beside the curve")
    curve = [arm_of(template, rate, sweep, where) for rate in sweep.rates]
    known = {one.name for one in fields(StudyConfig)}
    for key in values.keys() - known:
        hint = did_you_mean(key, [*known, *own, "arm"])
        raise UserError(f"{where}: {key}: unknown key{hint}")
    study = from_dict(StudyConfig, {**values, "arms": [*curve, *beside]}, where)
    if len(study.budget.amounts) > 1:
        raise UserError(f"{where}: budget.amounts: a compression study has one budget")
    config = CompressionConfig(study, sweep)
    for arm in study.arms:
        if arm.name in config.on_curve:
            _check_compressor(arm, config.on_curve[arm.name], sweep)
    return config


def arm_of(
    template: Mapping[str, object], rate: RateConfig, sweep: SweepConfig, where: str
) -> dict[str, object]:
    """Return the template with a rate's values filled in, as plain values.

    Raises:
        UserError: It names something that is neither a rate's nor a study's.
    """
    stride = stride_of(rate.grid, sweep)
    values: dict[str, Option] = {
        "name": rate.name,
        "grid": rate.grid,
        "channels": rate.channels,
        "stride": stride,
        "fraction": rate.grid * stride / sweep.image_size,
        "cell": sweep.image_size / rate.grid,
        **rate.values,
    }
    filled = _filled(template, values, f"{where}: arm")
    assert isinstance(filled, dict)
    return {"name": rate.name, **filled}


def _filled(value: object, values: Mapping[str, Option], where: str) -> object:
    if isinstance(value, Mapping):
        return {str(key): _filled(one, values, f"{where}.{key}") for key, one in value.items()}
    if isinstance(value, list):
        return [_filled(one, values, f"{where}[{index}]") for index, one in enumerate(value)]
    if not isinstance(value, str):
        return value
    try:
        parts = list(string.Formatter().parse(value))
    except ValueError as error:
        raise UserError(f"{where}: {value!r}: {error}") from error
    named = [name for _, name, _, _ in parts if name is not None]
    for name in named:
        if name not in values and name not in PLACES:
            hint = did_you_mean(name, [*values, *PLACES])
            raise UserError(f"{where}: names {{{name}}}, which no rate has{hint}")
    if len(named) == 1 and value == f"{{{named[0]}}}" and named[0] in values:
        return values[named[0]]  # a number stays one
    for name in named:
        if name in values:
            value = value.replace(f"{{{name}}}", str(values[name]))
    return value


def _check_compressor(arm: ArmConfig, rate: RateConfig, sweep: SweepConfig) -> None:
    """Refuse an arm whose compressor would make other latents than its rate says.

    Raises:
        UserError: Naming both, before anything is trained.
    """
    for step in arm.steps:
        if step.train != "stage_b" or step.config is None:
            continue
        section = values_of(step).get("compressor")
        if not isinstance(section, Mapping):
            raise UserError(f"{step.config}: has no compressor section; {arm.name} is its size")
        sizes = from_dict(CompressorConfig, section, f"{step.config} ({arm.name}): compressor")
        made = (*sizes.latent_size((sweep.image_size,) * 2), sizes.latent_channels)
        if made != (rate.grid, rate.grid, rate.channels):
            raise UserError(
                f"{step.config}: its compressor makes latents of {'x'.join(map(str, made))} of "
                f"pictures of {sweep.image_size} px, and the rate is {rate.name}; set "
                "compressor.input_fraction: '{fraction}' and compressor.latent_channels: "
                "'{channels}' in the template, and a config of stride {stride}"
            )
