"""What a study would take on a device that nobody has taken yet: ``python -m train.study cost``.

Operations are counted without weights (:mod:`train.study.step_flops`), and divided by a rate that
the user gives: what a device reaches in training, with a word on where the figure is from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cascade.checkpoints.files import on_meta
from cascade.config import from_dict, load_yaml, read_yaml
from cascade.errors import UserError
from cascade.evaluate.flops import FlopCounter
from cascade.evaluate.results import markdown_table
from cascade.evaluate.training_cost import read_ledger
from stages.autoencoder_kl import AutoencoderKL
from stages.unet.unet import UNet, UNetCondition
from train.distill.generate_config import GenerateConfig
from train.study.published_sizes import CLIP_TOKENS
from train.study.settings import ArmConfig, BudgetConfig, StepConfig, StudyConfig
from train.study.step_flops import Known, StepFlops, count_step

_SIZES = 6
"""Numbers that SDXL is told of a picture's size."""


@dataclass(frozen=True)
class DeviceRate:
    """What one device does in an hour, and what the hour costs."""

    name: str
    source: str
    """Where the rate is from: who measured it, of what."""
    tflops: float | None = None
    """TFLOP/s that it reaches in training."""
    ledger: str | None = None
    """In its place, a run of ``python -m train`` on that device, whose ledger says it."""
    price_per_hour: float | None = None
    price_source: str | None = None
    """Whose price that is, and of when."""

    def __post_init__(self) -> None:
        """Refuse figures from nowhere."""
        if (self.tflops is None) == (self.ledger is None):
            raise ValueError(f"{self.name}: give tflops or ledger, one of the two")
        if not self.source.strip():
            raise ValueError(f"{self.name}: source is empty; say where the rate is from")
        if self.tflops is not None and not self.tflops > 0:
            raise ValueError(f"{self.name}: tflops is {self.tflops}; it must be positive")
        if (self.price_per_hour is None) != (self.price_source is None):
            raise ValueError(f"{self.name}: price_per_hour and price_source belong together")
        if self.price_per_hour is not None and not self.price_per_hour >= 0:
            raise ValueError(f"{self.name}: price_per_hour is {self.price_per_hour}")

    @property
    def flops_per_second(self) -> float:
        """The rate.

        Raises:
            UserError: The ledger does not tell it.
        """
        if self.tflops is not None:
            return self.tflops * 1e12
        assert self.ledger is not None
        cost = read_ledger(Path(self.ledger))
        if not cost.flops or not cost.device_seconds:
            raise UserError(f"{self.ledger}: tells no FLOPs (torch.compile) or no seconds")
        return cost.flops / cost.device_seconds


@dataclass(frozen=True)
class RatesConfig:
    """The devices of a cost table."""

    rates: tuple[DeviceRate, ...]

    def __post_init__(self) -> None:
        """Refuse a table of nothing."""
        if not self.rates:
            raise ValueError("rates is empty; name a device")


@dataclass(frozen=True)
class StepCost:
    """What a step of an arm takes of a budget."""

    step: StepConfig
    flops: StepFlops | None
    """Of a training's sample; None: a command."""
    samples: float
    """That a training sees, or pictures that a teacher draws; 0: not counted."""
    device_seconds: float


def load_rates(path: str | Path) -> RatesConfig:
    """Read a file of devices.

    Raises:
        UserError: It is not one.
    """
    return load_yaml(RatesConfig, path)


def cost_of_arm(
    arm: ArmConfig,
    amount: float,
    budget: BudgetConfig,
    counted: Mapping[str, StepFlops],
    rate: float,
) -> list[StepCost]:
    """Deal a budget out as a study does, with operations in place of seconds that were tried.

    Args:
        arm: The arm.
        amount: Of the budget's unit.
        budget: What is counted.
        counted: Operations of a sample of each training, by its name.
        rate: FLOP/s of a device.

    Raises:
        UserError: A counted teacher's pictures take the whole budget.
    """
    found, drawn_s = [], {}
    for step in arm.steps:
        pictures, flops = drawn_by(step, arm)
        drawn_s[step.name] = pictures * flops / rate
    pays = [
        drawn_s[step.name]
        for step in arm.steps
        if step.cost == "arm" or (step.cost == "teacher" and budget.teacher == "counted")
    ]
    left = amount - (sum(pays) if budget.unit == "device_seconds" else 0.0)
    if left <= 0:
        raise UserError(f"{arm.name}: drawing takes {sum(pays):,.0f} s of {amount:g}")
    for step in arm.steps:
        if step.train is None:
            pictures, _ = drawn_by(step, arm)
            found.append(StepCost(step, None, pictures, drawn_s[step.name]))
            continue
        one = counted[step.name]
        own = one.total if budget.teacher == "counted" else one.total - one.teacher
        takes = {"samples": 1.0, "flops": one.learning, "device_seconds": own / rate}
        samples = step.share * left / takes[budget.unit]
        found.append(StepCost(step, one, samples, samples * one.total / rate))
    return found


def drawn_by(step: StepConfig, arm: ArmConfig) -> tuple[float, float]:
    """Return a teacher's pictures and the operations of one.

    Both are 0 of any other step, and where its file leaves the number, the size or the steps open.

    Raises:
        UserError: Its file is not one of a teacher.
    """
    if step.command != "train.distill generate":
        return 0.0, 0.0
    values = {} if step.config is None else read_yaml(step.config)
    own = {key.replace("-", "_"): value for key, value in step.set.items() if key != "device"}
    config = from_dict(GenerateConfig, {**values, **own}, f"{arm.name}: {step.name}")
    if config.limit is None or config.steps is None or config.sides[0] is None:
        return 0.0, 0.0  # as many as there are prompts, as the model has it: known when it is made
    known = Known(arm)
    sizes = known.sizes(config.unet or config.teacher, "unet")
    autoencoder = known.sizes(config.teacher, "autoencoder_kl")
    width, height = (int(side or 0) // autoencoder.downscale for side in config.sides)
    with on_meta():
        unet, decoder = UNet(sizes), AutoencoderKL(autoencoder)
    latents = torch.empty(1, autoencoder.latent_channels, height, width, device="meta")

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(1, *shape, device="meta")

    pooled = None if sizes.text_pooled_channels is None else empty(sizes.text_pooled_channels)
    told = None if sizes.text_pooled_channels is None else empty(_SIZES)
    with torch.inference_mode(), FlopCounter(take_apart=True) as counter:
        cond = unet.prepare(UNetCondition(empty(CLIP_TOKENS, sizes.text_channels), pooled, told))
        before = counter.total
        unet(latents, torch.empty(1, device="meta"), cond)
        call = counter.total - before
        before = counter.total
        decoder.decode(latents)
        decoded = counter.total - before
    calls = config.steps * (1 if config.guidance == 1 else 2)
    return float(config.limit * config.pictures_per_prompt), calls * call + decoded


def cost_lines(config: StudyConfig, image_size: int, rates: RatesConfig) -> list[str]:
    """Return the tables of a study: operations of a sample, then a table for each device.

    Args:
        config: The study.
        image_size: Side of pictures, in pixels, where a training takes them as they are.
        rates: The devices.

    Raises:
        UserError: An arm can't be counted.
    """
    counted = {
        arm.name: {
            step.name: count_step(step, arm, image_size)
            for step in arm.steps
            if step.train is not None
        }
        for arm in config.arms
    }
    rows = [
        [
            arm.name,
            name,
            f"{one.parameters / 1e6:,.1f}",
            *(f"{value / 1e9:,.4g}" for value in (one.learning, one.teacher, one.encoders)),
        ]
        for arm in config.arms
        for name, one in counted[arm.name].items()
    ]
    columns = ["arm", "training", "learns, M", "GFLOP a sample: learning", "teacher", "encoders"]
    lines = [f"# What {config.name} would cost", "", *markdown_table(columns, rows).splitlines()]
    lines += [
        "",
        "Counted on networks without weights, two for a multiply-accumulate: the training step "
        "with its backward pass and optimizer, the teacher's part in it, and the frozen encoders "
        "where the step runs them (shards of pictures, no cache).",
    ]
    for rate in rates.rates:
        lines += _device_lines(config, counted, rate)
    return lines


def _device_lines(
    config: StudyConfig, counted: Mapping[str, Mapping[str, StepFlops]], rate: DeviceRate
) -> list[str]:
    speed = rate.flops_per_second
    lines = ["", f"## {rate.name}: {speed / 1e12:,.4g} TFLOP/s", "", f"Rate: {rate.source}."]
    price = rate.price_per_hour
    if price is not None:
        lines.append(f"Price: {price:g} a device hour; {rate.price_source}.")
    columns = ["budget", "arm", "step", "samples", "device hours"]
    columns += [] if price is None else ["money"]
    rows: list[list[str]] = []
    total_s, once_s = 0.0, {}
    for amount in config.budget.amounts:
        for arm in config.arms:
            costs = cost_of_arm(arm, amount, config.budget, counted[arm.name], speed)
            for one in costs:
                if one.flops is None and not one.samples:
                    continue
                paid = f" ({one.step.cost})" if one.step.cost != "arm" else ""
                rows.append(
                    _row(
                        f"{amount:g}",
                        arm.name,
                        one.step.name + paid,
                        one.samples,
                        one.device_seconds,
                        price,
                    )
                )
                if one.step.shared:
                    once_s[one.step.name] = one.device_seconds
                else:
                    total_s += one.device_seconds * len(config.seeds)
            own = [one for one in costs if one.step.cost == "arm"]
            rows.append(
                _row(
                    f"{amount:g}",
                    arm.name,
                    "the arm",
                    None,
                    sum(one.device_seconds for one in own),
                    price,
                )
            )
    total_s += sum(once_s.values())
    lines += ["", *markdown_table(columns, rows).splitlines(), ""]
    whole = f"All of it, {len(config.seeds)} seeds: {_hours(total_s / 3600)} device hours"
    whole += "" if price is None else f", {total_s / 3600 * price:,.2f} of money"
    lines.append(
        f"{whole}. Not counted: judging, precompute, make-student, reading and writing, and what a "
        "rate of products leaves out."
    )
    return lines


def _row(
    amount: str, arm: str, step: str, samples: float | None, seconds: float, price: float | None
) -> list[str]:
    hours = seconds / 3600
    cells = [amount, arm, step, "" if samples is None else f"{samples:,.0f}", _hours(hours)]
    return cells + ([] if price is None else [f"{hours * price:,.2f}"])


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
