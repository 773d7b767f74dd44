"""The teacher of step distillation: a frozen Stage B or C, seen as TrigFlow, guided as asked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from cascade.checkpoints.found import FoundNetwork
from cascade.checkpoints.load import build
from cascade.checkpoints.part_files import find_network
from cascade.checkpoints.said import said_in
from cascade.config import from_dict
from cascade.diffusion.prediction import Prediction
from cascade.diffusion.schedules import check_schedule, make_schedule
from cascade.diffusion.trigflow import TrigFlow, along
from cascade.errors import UserError
from cascade.pipelines.few_steps import distilled_said
from cascade.pipelines.spec import SPEC_FILE, Stage, load_spec
from cascade.pipelines.trained import DIFFUSION_KEY
from stages.conditions import concat
from stages.stage_b import StageB, StageBBlock, StageBCondition, StageBConfig
from stages.stage_c import StageC, StageCBlock, StageCCondition, StageCConfig
from train.losses.denoising import SAMPLED

Condition = StageBCondition | StageCCondition
StageNetwork = StageB | StageC


@dataclass(frozen=True)
class TaughtPath:
    """What a teacher predicts, and on which path from data to noise."""

    prediction: Literal["epsilon", "v", "x0", "flow"] = "epsilon"
    """What it outputs."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Its path from data to noise."""
    zero_terminal_snr: bool = False
    """Whether its cosine ends at pure noise."""
    time_input: Literal["cosine", "raw"] = "cosine"
    """The time that it is told."""

    def __post_init__(self) -> None:
        """Refuse a schedule on which the prediction says nothing."""
        check_schedule(self.schedule, self.prediction, self.zero_terminal_snr)

    def trigflow(self) -> TrigFlow:
        """Return the change of variables."""
        schedule = make_schedule(self.schedule, zero_terminal_snr=self.zero_terminal_snr)
        return TrigFlow(schedule, Prediction(self.prediction), self.time_input)

    def metadata(self) -> dict[str, str]:
        """Return what an exported file says of it."""
        return {DIFFUSION_KEY: json.dumps(dataclasses.asdict(self))}


def find_path(found: FoundNetwork, stage: Stage, given: TaughtPath | None) -> TaughtPath:
    """Return what a teacher was trained on: what its file says, or its model, or the run.

    Raises:
        UserError: Nobody says it, or the run says otherwise than the file.
    """
    where = str(found.path)
    values = said_in(found.opened.metadata, DIFFUSION_KEY, where) or None
    if values is None and (found.path.parent / SPEC_FILE).is_file():
        sampling = getattr(load_spec(found.path.parent), stage)
        values = {name: getattr(sampling, name) for name in SAMPLED}
        where = str(found.path.parent / SPEC_FILE)
    if values is None:
        if given is None:
            raise UserError(
                f"teacher {found.path}: it does not say what it predicts; name that as taught "
                "(prediction, schedule, zero_terminal_snr, time_input)"
            )
        return given
    path = from_dict(TaughtPath, values, where)
    if given is not None and given != path:
        name = next(one for one in SAMPLED if getattr(given, one) != getattr(path, one))
        raise UserError(
            f"taught.{name} is {getattr(given, name)} but {where} says {getattr(path, name)}; "
            "leave taught out"
        )
    return path


class StageTeacher:
    """A frozen stage in evaluation mode; no part of the system: no checkpoint holds it."""

    def __init__(
        self,
        name: str,
        stage: Stage,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        taught: TaughtPath | None = None,
    ) -> None:
        """Find the weights; only headers are read.

        Args:
            name: As ``find_network`` takes it.
            stage: Which stage.
            dtype: Number format in which it is kept and runs.
            taught: What it was trained on, where nothing else says it.

        Raises:
            UserError: They are not there, are another network's or Würstchen v2's.
        """
        self.name, self.stage = name, stage
        self.dtype: torch.dtype = getattr(torch, dtype)
        self._found = find_network(name, stage)
        if not isinstance(self._found.published.config, (StageBConfig, StageCConfig)):
            raise UserError(
                f"teacher {name}: a network of Würstchen v2; steps are distilled into those of v3"
            )
        self.file = self._found.path
        """Its file, or the index of its shards."""
        self._distilled = distilled_said(self._found.opened.metadata, str(self.file))
        if self._distilled.get("max_steps") is not None:
            raise UserError(
                f"teacher {name}: a student for few steps itself, with no path to follow; name the "
                "plain network, and this one as init_from"
            )
        self.path = find_path(self._found, stage, taught)
        try:
            self.trigflow = self.path.trigflow()
            self.angles = self.trigflow.angles
        except ValueError as error:
            raise UserError(f"teacher {name}: {error}") from error
        self._network: StageNetwork | None = None

    @property
    def config(self) -> StageBConfig | StageCConfig:
        """Its sizes."""
        return cast("StageBConfig | StageCConfig", self._found.published.config)

    def check_guidance(self, low: float, high: float) -> None:
        """Refuse scales that a teacher does not know.

        Raises:
            UserError: Guidance was distilled into it, for others.
        """
        known = self._distilled.get("guidance_range")
        if known is not None and not known[0] <= low <= high <= known[1]:
            raise UserError(
                f"guidance.low {low:g} and guidance.high {high:g}: guidance was distilled into "
                f"teacher {self.name}, for {known[0]:g} to {known[1]:g} alone"
            )

    @property
    def is_told_guidance(self) -> bool:
        """Whether guidance was distilled into it already."""
        return "cfg" in self.config.time_conds

    def load(self, device: torch.device) -> StageNetwork:
        """Load the weights onto a device, and return the network."""
        network = build(self._found.opened, self._found.published, device=device, dtype=self.dtype)
        self._network = cast(StageNetwork, network.eval().requires_grad_(False))
        return self._network

    @property
    def network(self) -> StageNetwork:
        """The loaded network."""
        assert self._network is not None, "load() comes first"
        return self._network

    # Not inference_mode, whose tensors no loss could be made of.
    @torch.no_grad()
    def velocity(
        self, x: Tensor, angle: Tensor, cond: Condition, uncond: Condition | None, scale: Tensor
    ) -> Tensor:
        """Return the guided velocity at TrigFlow's ``x``, float32, under no autocast.

        Args:
            x: ``(B, C, h, w)``.
            angle: ``(B,)``.
            cond: What it is told.
            uncond: What guidance leads away from; None: it is off, and half the work.
            scale: Guidance scales, ``(B,)``; 1 is none.
        """
        if self._distilled:
            told = dataclasses.replace(cond, cfg=scale) if self.is_told_guidance else cond
            return self._said(x, angle, told)
        if uncond is None:
            return self._said(x, angle, cond)
        pair = concat([cond, uncond])
        twice = self._said(torch.cat([x, x]), angle.repeat(2), pair)
        with_prompt, without = twice.chunk(2)
        return without + along(scale, x) * (with_prompt - without)

    def features(
        self, x: Tensor, angle: Tensor, cond: Condition, blocks: Sequence[str]
    ) -> list[Tensor]:
        """Return what blocks give at TrigFlow's ``x``, each ``(B, C, h, w)``; x has its gradient.

        Args:
            x: ``(B, C, h, w)``.
            angle: ``(B,)``.
            cond: What it is told.
            blocks: Names of ``blocks_of``.
        """
        with captured(self.network, blocks) as found:
            self._said(x, angle, cond)
        return [found[name] for name in blocks]

    def _said(self, x: Tensor, angle: Tensor, cond: Condition) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            given, time = self.trigflow.told(x, angle)
            predicted = self.network(given.to(self.dtype), time, in_dtype(cond, self.dtype))
            return self.trigflow.velocity(predicted.float(), x, angle)


def in_dtype(cond: Condition, dtype: torch.dtype) -> Condition:
    """Return a condition whose states are in a number format; scalars keep theirs."""
    cast_fields: dict[str, Any] = {
        one.name: value.to(dtype)
        for one in dataclasses.fields(cond)
        if isinstance(value := getattr(cond, one.name), Tensor) and value.dim() > 1
    }
    return dataclasses.replace(cond, **cast_fields)


def evenly(network: nn.Module, count: int) -> list[str]:
    """Return the names of ``count`` blocks of a stage, evenly spread, the last one among them.

    Raises:
        ValueError: It has fewer.
    """
    names = [
        name for name, one in network.named_modules() if isinstance(one, (StageBBlock, StageCBlock))
    ]
    if count > len(names):
        raise ValueError(f"{count} blocks are wanted, the network has {len(names)}")
    return [names[(index + 1) * len(names) // count - 1] for index in range(count)]


@contextmanager
def captured(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Keep what modules return inside, by name; afterwards nothing of it is left on them."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            found[name] = output

        return network.get_submodule(name).register_forward_hook(hook)

    handles = [keep(name) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
