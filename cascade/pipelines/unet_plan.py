"""What a U-Net is to make, settled and checked before any network runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from cascade.config import not_among
from cascade.diffusion.discrete import Spacing
from cascade.errors import UserError
from cascade.pipelines.picture_input import MODES, PictureInput, PictureTask, fit_picture
from cascade.pipelines.plan import (
    NO_INTERVAL,
    PicturePlan,
    check_count,
    check_guidance,
    check_text,
    make_requests,
)
from cascade.pipelines.sizes import fit_size
from cascade.pipelines.spec import MAX_STEPS
from cascade.pipelines.unet_spec import SPACINGS, UNET_SAMPLERS, UNetSampling, UNetSpec

S = TypeVar("S", bound=str)
_MAX_SIDE = 1 << 16


@dataclass(frozen=True)
class SizeCondition:
    """What SDXL is told of a picture's size, each as height and width in pixels."""

    original: tuple[int, int]
    """Of the picture before it was cropped and scaled; small ones look blurred."""
    crop: tuple[int, int]
    """Top and left of the crop; (0, 0) is a picture whose subject lies in the middle."""
    target: tuple[int, int]
    """Of the picture itself."""

    def values(self) -> tuple[int, ...]:
        """Return the six numbers in the network's order."""
        return (*self.original, *self.crop, *self.target)


@dataclass(frozen=True)
class UNetSettings:
    """What a call may choose; None is the model's own value."""

    negative_prompt: str = ""
    """What pictures are steered away from."""
    seed: int | None = None
    """Seed of each prompt's first picture; the next ones count up. None draws one."""
    seeds: Sequence[int] | None = None
    """One seed for each picture instead, in the order of the plan."""
    num_images: int = 1
    """Pictures for each prompt."""
    steps: int | None = None
    """Evaluations of the network."""
    guidance: float | None = None
    """Guidance scale; 1 is off."""
    guidance_interval: tuple[float, float] | None = None
    """Diffusion times between which guidance is applied; a step outside is one pass, not two."""
    sampler: str | None = None
    """"euler", "euler_ancestral", "ddim", "dpmpp_2m" or "lcm"."""
    spacing: str | None = None
    """Where the timesteps lie: "leading", "trailing" or "linspace"."""
    width: int | None = None
    """Width in pixels, rounded to what the model makes."""
    height: int | None = None
    """Height in pixels, rounded to what the model makes."""
    original_size: tuple[int, int] | None = None
    """SDXL alone: height and width before the crop; None: those of the picture."""
    crop: tuple[int, int] | None = None
    """SDXL alone: top and left of the crop; None: (0, 0)."""
    target_size: tuple[int, int] | None = None
    """SDXL alone: height and width after the crop; None: those of the picture."""


@dataclass(frozen=True)
class UNetPlan(PicturePlan):
    """Pictures for a U-Net to make, and the settings that they share."""

    sampling: UNetSampling
    """Sampling, from noise."""
    sizes: SizeCondition | None
    """What SDXL is told of sizes; None for SD."""
    notices: tuple[str, ...] = ()
    """What was changed, and what the user should know."""
    picture: PictureTask | None = None
    """The picture that the pictures are made of; None: of prompts alone."""

    @property
    def steps(self) -> int:
        """Steps that are walked: of a picture the last ones, as its strength has it."""
        return self.sampling.steps_of(1.0 if self.picture is None else self.picture.strength)


def make_unet_plan(
    spec: UNetSpec,
    prompt: str | Sequence[str],
    settings: UNetSettings | None = None,
    *,
    picture: PictureInput | None = None,
) -> UNetPlan:
    """Settle what a call makes.

    Args:
        spec: The model; what the settings leave open is taken from it.
        prompt: One prompt or several.
        settings: Everything else; None leaves all of it open.
        picture: A picture to start from; its mode is "img2img".

    Raises:
        UserError: For anything that cannot be made, saying what can.
    """
    wanted = settings or UNetSettings()
    if picture is not None and picture.mode in MODES and picture.mode != "img2img":
        raise UserError(
            f"mode {picture.mode!r}: of pictures a U-Net does 'img2img' alone; a cascade does it"
        )
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise UserError("no prompt given; give at least one")
    for index, one in enumerate(prompts):
        check_text(one, f"prompt {index + 1}")
        if not one.strip():
            raise UserError(f"prompt {index + 1} is empty; say what the picture shows")
    check_text(wanted.negative_prompt, "the negative prompt")
    check_count("num_images", wanted.num_images, 1_000_000)
    task: PictureTask | None = None
    if picture is None:
        width, height, notices = fit_size(spec, wanted.width, wanted.height)
    else:
        task, width, height, notices = fit_picture(spec, picture, wanted.width, wanted.height)
    sampling = _override(spec.sampling, wanted)
    if task is not None and sampling.steps_of(task.strength) < 1:
        raise UserError(
            f"strength {task.strength:g} of {sampling.steps} steps is less than one: choose more "
            "steps, or a strength nearer to 1"
        )
    if wanted.negative_prompt.strip() and sampling.guidance == 1:
        notices.append("the negative prompt has no effect: guidance is off")
    if wanted.guidance_interval is not None and sampling.guidance == 1:
        notices.append(NO_INTERVAL)
    return UNetPlan(
        requests=make_requests(prompts, wanted.seed, wanted.seeds, wanted.num_images),
        negative_prompt=wanted.negative_prompt,
        width=width,
        height=height,
        sampling=sampling,
        sizes=_sizes(spec, wanted, (height, width)),
        notices=(*spec.notices, *notices),
        picture=task,
    )


def _sizes(spec: UNetSpec, wanted: UNetSettings, own: tuple[int, int]) -> SizeCondition | None:
    names = ("original_size", "crop", "target_size")
    given = {name: getattr(wanted, name) for name in names if getattr(wanted, name) is not None}
    if not spec.is_told_sizes:
        for name in given:
            raise UserError(f"{name}: this model is told no sizes; SDXL and its students are")
        return None
    for name, value in given.items():
        whole = len(value) == 2 and all(
            isinstance(one, int) and not isinstance(one, bool) for one in value
        )
        least = 0 if name == "crop" else 1
        if not whole or not all(least <= one <= _MAX_SIDE for one in value):
            raise UserError(
                f"{name} {value!r}, height and width: two whole numbers of pixels, {least} to "
                f"{_MAX_SIDE}, are needed"
            )
    return SizeCondition(
        original=wanted.original_size or own,
        crop=wanted.crop or (0, 0),
        target=wanted.target_size or own,
    )


def _override(sampling: UNetSampling, wanted: UNetSettings) -> UNetSampling:
    if wanted.steps is not None:
        check_count("steps", wanted.steps, MAX_STEPS)
    steps = sampling.steps if wanted.steps is None else wanted.steps
    guidance = sampling.guidance
    if wanted.guidance is not None:
        guidance = check_guidance("guidance", wanted.guidance, guidance)
    sampler = _one_of("sampler", wanted.sampler, UNET_SAMPLERS) or sampling.sampler
    spacing: Spacing = _one_of("spacing", wanted.spacing, SPACINGS) or sampling.spacing
    if wanted.spacing is not None and sampler == "lcm":
        raise UserError("spacing: the sampler lcm has timesteps of its own; leave it out")
    try:
        interval = wanted.guidance_interval or sampling.guidance_interval
        return replace(
            sampling,
            steps=steps,
            guidance=guidance,
            guidance_interval=interval,
            sampler=sampler,
            spacing=spacing,
        )
    except ValueError as error:  # steps that these timesteps do not allow
        raise UserError(str(error)) from error


def _one_of(name: str, value: str | None, choices: Iterable[S]) -> S | None:
    """Return the choice that was named."""
    if value is None:
        return None
    for choice in choices:
        if choice == value:
            return choice
    raise not_among(name, value, choices)
