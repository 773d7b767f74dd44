"""Pictures of many prompts: shared out over processes, resumable, each from a seed of its own.

What is to be made is a list of :class:`Item`, a :class:`Part` says which of them are this
process's, a :class:`PictureMaker` makes them with a cascade or a U-Net, and whoever called keeps
them: as files (:func:`make_files`), as shards (``train.distill.factory``). Processes never talk to
each other, so that one that dies holds up no other.

How far a picture is the same: its noise comes from its seed alone, whatever its neighbours, rank or
number of processes. With ``batch_size=1`` (the default on a CPU) nothing else differs either, and
on one kind of machine it is the same to the bit. In larger batches matrix products may round
otherwise where a batch has another size, as the last one of a share has: pictures then agree to
rounding.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

from cascade.checkpoints.hub import refuse_lite, resolve
from cascade.errors import UserError
from cascade.images import save_png
from cascade.launchers import Part
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.finite import BlankPictureError, NonFiniteError
from cascade.pipelines.latent import LatentPipeline, is_latent
from cascade.pipelines.parts import Dialect, open_source
from cascade.pipelines.placement import (
    DtypeChoice,
    format_said,
    pick_device,
    pick_dtypes,
    pick_unet_dtypes,
)
from cascade.pipelines.plan import Plan, Request, Settings, check_text, make_plan
from cascade.pipelines.results import Picture
from cascade.pipelines.sizes import is_far
from cascade.pipelines.spec import CascadeSpec
from cascade.pipelines.unet import UNetPipeline
from cascade.pipelines.unet_lora import LoraChoice
from cascade.pipelines.unet_parts import is_unet, open_unet_source
from cascade.pipelines.unet_plan import UNetPlan, UNetSettings, make_unet_plan
from cascade.pipelines.unet_spec import UNetSpec

_log = logging.getLogger(__name__)

T = TypeVar("T")
_TELL_EVERY_S = 20.0
_CHUNK = 8
"""Batches that are planned together; a prompt's text states are kept no longer."""


@dataclass(frozen=True)
class Item:
    """A picture to make."""

    key: str
    """Its name among all, of which a file's is made; with ``/`` in it, one in a folder."""
    prompt: str
    seed: int


def item_seed(seed: int, prompt: str, number: int) -> int:
    """Return the seed of a prompt's ``number``-th picture: 32 bits, short enough to be typed again.

    It depends on the prompt itself and not on its place: prompts that are added change no other's.
    """
    digest = hashlib.sha256(f"item:{seed}:{number}:{prompt}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


@dataclass(frozen=True)
class MakerOptions:
    """A model, and how it is asked; None leaves a choice to the model."""

    model: str
    """A folder, a single file of SD or SDXL, or a hub id."""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    """Steps of a U-Net, or of Stage C."""
    guidance: float | None = None
    """Guidance scale of a U-Net, or of Stage C; 1 is off."""
    sampler: str | None = None
    negative_prompt: str = ""
    spacing: str | None = None
    """U-Nets: where the timesteps lie."""
    unet: Path | None = None
    """U-Nets: another U-Net to run in place of the model's own, such as SDXL-Lightning's."""
    loras: tuple[LoraChoice, ...] = ()
    """U-Nets: what is merged into them."""
    steps_b: int | None = None
    """Cascades: steps of Stage B."""
    guidance_b: float | None = None
    """Cascades: guidance scale of Stage B."""
    dialect: Dialect = "official"
    """Cascades: how published weights are sampled."""
    variant: str | None = None
    """The mark of a set of weights on the hub, such as ``fp16``."""
    device: str = "auto"
    dtype: DtypeChoice = "auto"
    int8: bool = False
    """Keep linear weights in int8."""


AnyPipeline = UNetPipeline | CascadePipeline | LatentPipeline


@dataclass(frozen=True)
class Refused:
    """A picture that is none."""

    reason: str


class PictureMaker:
    """Any model of ours that makes pictures of prompts; only headers are read at first."""

    def __init__(self, options: MakerOptions) -> None:
        """Find the model and settle how it is sampled.

        Raises:
            UserError: It is not there, or can't make what was asked: a size that it does not make
                to the pixel, or one far from those that it learned, among them.
        """
        files = resolve(options.model, variant=options.variant)
        self.options = options
        latent = next((folder for folder in files.folders if is_latent(folder)), None)
        self.is_latent = latent is not None
        if self.is_latent:
            refuse_lite(files, "a Stage C on an autoencoder's latents")
        self.is_unet = latent is None and is_unet(files)
        _refuse_others(options, self.is_unet)
        # Any prompt will do: what is shared by all pictures is settled here.
        self.spec: UNetSpec | CascadeSpec
        self._plan: UNetPlan | Plan
        self._open: Callable[[], AnyPipeline]
        self.loras: list[dict[str, object]] = []
        """File, hash and weight of each LoRA."""
        self.dtype: str
        """Number format that the networks will run in."""
        device = pick_device(options.device)
        if self.is_unet:
            unet_source = open_unet_source(files, options.unet, options.loras)
            self.spec = unet_source.spec
            self._plan = make_unet_plan(unet_source.spec, "any", _unet_settings(options))
            self.weights_hash = unet_source.weights_hash
            self.loras = [one.described for one in unet_source.loras]
            in_float16 = unet_source.spec.autoencoder_in_float16
            dtypes, _ = pick_unet_dtypes(options.dtype, device, autoencoder_in_float16=in_float16)
            self.dtype = format_said(dtypes, options.int8)
            self._open = lambda: UNetPipeline(
                unet_source, device=options.device, dtype=options.dtype, int8=options.int8
            )
        elif latent is not None:
            if not isinstance(options.dtype, str):
                raise UserError(f"dtype: {options.model} takes one number format for all of it")
            if options.int8:
                raise UserError(f"int8: {options.model} is not run so; leave it out")
            opened = LatentPipeline(latent, device=options.device, dtype=options.dtype)
            self.spec = opened.spec
            self._plan = make_plan(opened.spec, "any", _cascade_settings(options))
            self.weights_hash = opened.weights_hash
            self.dtype = str(opened.dtypes)
            self._open = lambda: opened
        else:
            source = open_source(files, dialect=options.dialect)
            self.spec = source.spec
            self._plan = make_plan(source.spec, "any", _cascade_settings(options))
            self.weights_hash = source.weights_hash()
            self.dtype = format_said(pick_dtypes(options.dtype, device), options.int8)
            self._open = lambda: CascadePipeline(
                source, device=options.device, dtype=options.dtype, int8=options.int8
            )
        self._check_size()
        self._pipeline: AnyPipeline | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the pictures."""
        return self._plan.width, self._plan.height

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know."""
        return self._plan.notices

    def settings(self) -> dict[str, object]:
        """Return all that a picture depends on beside prompt and seed, as plain values."""
        plan = self._plan
        sampling: dict[str, object] = (
            {"unet": dict(vars(plan.sampling))}
            if isinstance(plan, UNetPlan)
            else {"stage_c": dict(vars(plan.stage_c)), "stage_b": dict(vars(plan.stage_b))}
        )
        return {
            **sampling,
            "teacher": self.weights_hash,
            "width": plan.width,
            "height": plan.height,
            "negative_prompt": plan.negative_prompt,
            "dtype": self.dtype,
            "loras": self.loras,
        }

    def sampling(self) -> dict[str, dict[str, object]]:
        """Return by the model's kind what a protocol may say of its sampling, as it will be."""
        plan = self._plan
        if isinstance(plan, UNetPlan):
            one = plan.sampling
            own = {"steps": one.steps, "guidance": one.guidance, "sampler": one.sampler}
            return {"unet": {**own, "spacing": one.spacing, "dtype": self.dtype}}
        c, b = plan.stage_c, plan.stage_b
        found: dict[str, object] = {
            "steps_c": c.steps,
            "guidance_c": c.guidance,
            "sampler": c.sampler,
            "dtype": self.dtype,
        }
        if not self.is_latent:
            found |= {"steps_b": b.steps, "guidance_b": b.guidance}
        return {"cascade": found}

    def load(self) -> AnyPipeline:
        """Load the networks, once.

        Raises:
            UserError: Something is missing or does not fit, as a text encoder of another width.
        """
        if self._pipeline is None:
            self._pipeline = self._open()
        return self._pipeline

    def make(
        self, items: Iterable[Item], *, batch_size: int | None = None
    ) -> Iterator[tuple[Item, Picture | Refused]]:
        """Make pictures and give each as soon as it is finished, in the order of the items.

        Of a batch in which a value is not finite, or a picture entirely black, each is made again
        alone: those that fail are refused, their neighbours are not.

        Args:
            items: What to make; read a little ahead.
            batch_size: Pictures that run together; None: as the pipeline has it.

        Raises:
            UserError: For what no picture can be made of.
        """
        pipeline = self.load()
        together = batch_size or (1 if pipeline.device.type == "cpu" else 4)
        waiting = iter(items)
        while chunk := list(islice(waiting, together * _CHUNK)):
            while chunk:
                done = 0
                try:
                    for picture in self._run(chunk, together):
                        done += 1
                        yield chunk[done - 1], picture
                except (NonFiniteError, BlankPictureError):
                    for item in chunk[done : done + together]:
                        yield item, self._alone(item)
                    done += together
                chunk = chunk[done:]

    def _alone(self, item: Item) -> Picture | Refused:
        try:
            [picture] = self._run([item], 1)
        except NonFiniteError:
            return Refused("values that are not finite")
        except BlankPictureError:
            return Refused("entirely black")
        return picture

    def _run(self, items: Sequence[Item], batch_size: int) -> Iterator[Picture]:
        for item in items:
            check_text(item.prompt, f"the prompt of {item.key}")
        requests = tuple(Request(item.prompt, item.seed) for item in items)
        pipeline, plan = self.load(), self._plan
        if isinstance(pipeline, UNetPipeline):
            assert isinstance(plan, UNetPlan), "a U-Net has a U-Net's plan"
            ready = replace(plan, requests=requests)
            yield from pipeline.run(ready, batch_size=batch_size, progress=False)
        else:
            assert isinstance(plan, Plan), "a cascade has a cascade's plan"
            wanted = replace(plan, requests=requests)
            yield from pipeline.run(wanted, batch_size=batch_size, progress=False)

    def _check_size(self) -> None:
        """Refuse what a single picture may be rounded to, or get a notice for."""
        spec, (width, height) = self.spec, self.size
        asked = self.options.width or width, self.options.height or height
        if asked != (width, height):
            raise UserError(
                f"size {asked[0]}x{asked[1]}: {self.options.model} makes multiples of "
                f"{spec.size_multiple} pixels; the nearest is {width}x{height}"
            )
        if is_far(spec, width, height):
            raise UserError(
                f"size {width}x{height}: {self.options.model} learned "
                f"{spec.image_size}x{spec.image_size} and makes odd pictures of less than half or "
                "more than twice that; choose a size between"
            )


def _refuse_others(options: MakerOptions, unet: bool) -> None:
    """Refuse options that a model of this kind has no use for."""
    names = ("steps_b", "guidance_b") if unet else ("spacing", "unet", "loras")
    for name in names:
        if getattr(options, name):
            what = "a U-Net" if unet else "a cascade"
            raise UserError(f"{name}: {options.model} is {what}, which has none; leave it out")


def _unet_settings(options: MakerOptions) -> UNetSettings:
    return UNetSettings(
        negative_prompt=options.negative_prompt,
        seed=0,
        steps=options.steps,
        guidance=options.guidance,
        sampler=options.sampler,
        spacing=options.spacing,
        width=options.width,
        height=options.height,
    )


def _cascade_settings(options: MakerOptions) -> Settings:
    return Settings(
        negative_prompt=options.negative_prompt,
        seed=0,
        steps_c=options.steps,
        steps_b=options.steps_b,
        guidance_c=options.guidance,
        guidance_b=options.guidance_b,
        sampler=options.sampler,
        width=options.width,
        height=options.height,
    )


def make_files(
    maker: PictureMaker,
    items: Sequence[Item],
    folder: Path,
    part: Part,
    *,
    batch_size: int | None = None,
) -> list[tuple[Item, Refused]]:
    """Make ``FOLDER/KEY.png`` of this process's items; those that are there are left as they are.

    Returns:
        What was refused.
    """
    missing = missing_of(part.of(items), folder)
    if not missing:
        return []  # nothing is loaded
    refused = []
    told_s = time.monotonic()
    for done, (item, made) in enumerate(maker.make(missing, batch_size=batch_size), 1):
        if isinstance(made, Refused):
            refused.append((item, made))
            _log.warning("%s is refused: %s", item.key, made.reason)
        else:
            path = file_of(item, folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(made.image, path, made.metadata)
        if time.monotonic() - told_s > _TELL_EVERY_S or done == len(missing):
            told_s = time.monotonic()
            _log.info("%d of %d pictures made", done - len(refused), len(missing))
    return refused


def file_of(item: Item, folder: Path) -> Path:
    """Return an item's file among those of :func:`make_files`."""
    return folder / f"{item.key}.png"


def missing_of(items: Sequence[Item], folder: Path) -> list[Item]:
    """Return the items that have no file yet."""
    return [item for item in items if not file_of(item, folder).is_file()]
