"""What is to be made, settled and checked before any network runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

from cascade.config import not_among
from cascade.errors import UserError
from cascade.pipelines.control_input import ControlInput, ControlTask, fit_control
from cascade.pipelines.few_steps import (
    check_range,
    check_sampler,
    check_start,
    check_steps,
    choose,
)
from cascade.pipelines.picture_input import NEEDS_PROMPT, PictureInput, PictureTask, fit_picture
from cascade.pipelines.sizes import fit_size
from cascade.pipelines.spec import MAX_GUIDANCE, MAX_STEPS, CascadeSpec, Stage, StageSampling
from cascade.rng import MAX_SEED, check_seed, fresh_seed

NO_INTERVAL = "the guidance interval has no effect: guidance is off"
SAMPLER_NAMES = ("ddpm", "ddim", "dpmpp_2m", "lcm")


@dataclass(frozen=True)
class Settings:
    """What a call may choose; None is the model's own value."""

    negative_prompt: str = ""
    """What pictures are steered away from, in both diffusion stages."""
    seed: int | None = None
    """Seed of each prompt's first picture; the next ones count up. None draws one."""
    seeds: Sequence[int] | None = None
    """One seed for each picture instead, in the order of :class:`Plan`."""
    num_images: int = 1
    """Pictures for each prompt."""
    steps_c: int | None = None
    """Steps of Stage C."""
    steps_b: int | None = None
    """Steps of Stage B."""
    guidance_c: float | None = None
    """Guidance scale of Stage C; 1 is off."""
    guidance_b: float | None = None
    """Guidance scale of Stage B; 1 is off."""
    guidance_interval: tuple[float, float] | None = None
    """Diffusion times between which Stage C is guided; a step outside is one pass, not two."""
    sampler: str | None = None
    """"ddpm", "ddim" or "dpmpp_2m", for both stages; of networks for few steps "lcm" alone."""
    width: int | None = None
    """Width in pixels, rounded to what the cascade makes."""
    height: int | None = None
    """Height in pixels, rounded to what the cascade makes."""


@dataclass(frozen=True)
class Request:
    """One picture to make."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class PicturePlan:
    """Pictures to make, whatever makes them."""

    requests: tuple[Request, ...]
    """Pictures in order: all pictures of the first prompt, then of the second."""
    negative_prompt: str
    """What the pictures are steered away from; "" is the null prompt."""
    width: int
    """Width in pixels."""
    height: int
    """Height in pixels."""


@dataclass(frozen=True)
class Plan(PicturePlan):
    """Pictures for a cascade to make, and the settings that they share."""

    stage_c: StageSampling
    """Sampling of Stage C, from noise; see ``stage_c_run``."""
    stage_b: StageSampling
    """Sampling of Stage B."""
    notices: tuple[str, ...] = ()
    """What was changed, and what the user should know."""
    picture: PictureTask | None = None
    """The picture that the pictures are made of; None: of prompts alone."""
    control: ControlTask | None = None
    """The picture that a ControlNet leads Stage C by."""
    few: frozenset[Stage] = frozenset()
    """Stages that the model's network for few steps takes over."""

    @property
    def stage_c_run(self) -> StageSampling:
        """Sampling of Stage C from where it starts: a shorter way takes as many steps less.

        So does the published notebook.
        """
        if self.picture is None or self.picture.strength == 1 or self.stage_c.times:
            return self.stage_c
        steps = max(1, int(self.stage_c.steps * self.picture.strength))
        return replace(self.stage_c, steps=steps)


def make_plan(
    spec: CascadeSpec,
    prompt: str | Sequence[str],
    settings: Settings | None = None,
    *,
    picture: PictureInput | None = None,
    control: ControlInput | None = None,
) -> Plan:
    """Settle what a call makes.

    Args:
        spec: The cascade; what the settings leave open is taken from it.
        prompt: One prompt or several; with a picture to vary or reconstruct it may be empty.
        settings: Everything else; None leaves all of it open.
        picture: A picture to start from.
        control: A picture that a ControlNet leads Stage C by.

    Raises:
        UserError: For anything that cannot be made, saying what can.
    """
    wanted = Settings() if settings is None else settings
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    may_be_empty = picture is not None and picture.mode not in NEEDS_PROMPT
    for number, text in enumerate(prompts, start=1):
        check_text(text, f"prompt {number}" if len(prompts) > 1 else "the prompt")
        if not text.strip() and not may_be_empty:
            which = f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
            raise UserError(f"{which} is empty; say what the picture shows")
    if not prompts:
        raise UserError("no prompt given; say what the picture shows")
    check_text(wanted.negative_prompt, "the negative prompt")
    check_count("num_images", wanted.num_images, 1_000_000)
    task: PictureTask | None = None
    if picture is None:
        width, height, notices = fit_size(spec, wanted.width, wanted.height)
    else:
        task, width, height, notices = fit_picture(spec, picture, wanted.width, wanted.height)
    from_within = task is not None and task.mode != "reconstruct" and task.strength < 1
    own_c, few_c = choose(spec, "stage_c", wanted.steps_c, wanted.sampler, from_within=from_within)
    if from_within:
        check_start(own_c)
    own_b, few_b = choose(spec, "stage_b", wanted.steps_b, wanted.sampler)
    stage_c = _override(own_c, "c", wanted.steps_c, wanted.guidance_c, wanted.sampler)
    if wanted.guidance_interval is not None:
        if stage_c.guidance_range is not None:
            raise UserError(
                "guidance_interval: guidance was distilled into this Stage C, whose steps are one "
                "pass anyway; leave it out"
            )
        try:
            stage_c = replace(stage_c, guidance_interval=wanted.guidance_interval)
        except ValueError as error:
            raise UserError(str(error)) from error
        if stage_c.guidance == 1:
            notices.append(NO_INTERVAL)
    stage_b = _override(own_b, "b", wanted.steps_b, wanted.guidance_b, wanted.sampler)
    if task is not None and task.mode == "reconstruct":
        for name in ("steps_c", "guidance_c", "guidance_interval"):
            if getattr(wanted, name) is not None:
                raise UserError(f"{name}: Stage C does not run in a reconstruction; leave it out")
    if wanted.negative_prompt.strip():
        notices += _about_negative_prompt(stage_c, stage_b)
    return Plan(
        requests=make_requests(prompts, wanted.seed, wanted.seeds, wanted.num_images),
        negative_prompt=wanted.negative_prompt,
        width=width,
        height=height,
        stage_c=stage_c,
        stage_b=stage_b,
        notices=tuple(notices),
        picture=task,
        control=None if control is None else fit_control(control, task, width, height),
        few=few_c | few_b,
    )


def _about_negative_prompt(stage_c: StageSampling, stage_b: StageSampling) -> list[str]:
    """Say if nothing leads away from a negative prompt."""
    if stage_c.is_guided_by_passes or stage_b.is_guided_by_passes:
        return []
    if stage_c.guidance == 1 and stage_b.guidance == 1:
        return ["the negative prompt has no effect: guidance is off in both stages"]
    return ["the negative prompt has no effect: guidance was distilled into the networks"]


def make_requests(
    prompts: Sequence[str], seed: int | None, seeds: Sequence[int] | None, num_images: int
) -> tuple[Request, ...]:
    """Return the pictures of prompts with their seeds.

    Raises:
        UserError: If the seeds do not fit.
    """
    repeated = [prompt for prompt in prompts for _ in range(num_images)]
    if seeds is not None:
        if seed is not None:
            raise UserError("seed and seeds exclude each other; give one of them")
        if len(seeds) != len(repeated):
            raise UserError(
                f"{len(seeds)} seeds for {len(repeated)} pictures ({len(prompts)} prompts, "
                f"{num_images} pictures each); give one for each picture"
            )
        return tuple(
            Request(prompt, check_seed(one)) for prompt, one in zip(repeated, seeds, strict=True)
        )
    first = fresh_seed() if seed is None else check_seed(seed)
    if first + num_images - 1 > MAX_SEED:
        raise UserError(f"seed {first}: with {num_images} pictures it runs beyond {MAX_SEED}")
    return tuple(
        Request(prompt, first + index) for prompt in prompts for index in range(num_images)
    )


def _override(
    sampling: StageSampling,
    stage: str,
    steps: int | None,
    guidance: float | None,
    sampler: str | None,
) -> StageSampling:
    if steps is not None:
        check_count(f"steps_{stage}", steps, MAX_STEPS)
        check_steps(f"steps_{stage}", steps, sampling)
        if steps != sampling.steps:  # its own number has its own times
            sampling = replace(sampling, steps=steps, times=())
    if guidance is not None:
        own = sampling.guidance
        scale = check_guidance(f"guidance_{stage}", guidance, own)
        check_range(f"guidance_{stage}", scale, sampling)
        sampling = replace(sampling, guidance=scale)
    if sampler is not None:
        if sampler not in SAMPLER_NAMES:
            raise not_among("sampler", sampler, SAMPLER_NAMES)
        check_sampler(f"Stage {stage.upper()}", sampler, sampling)
        # The check above is what makes the narrower type true.
        sampling = replace(sampling, sampler=sampler)  # type: ignore[arg-type]
    return sampling


def check_guidance(name: str, value: float, own: float) -> float:
    """Return a guidance scale.

    Raises:
        UserError: If it is none; it names the model's own.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 1 <= value <= MAX_GUIDANCE:
        raise UserError(
            f"{name} {value}: 1 switches guidance off, {MAX_GUIDANCE} is the strongest; this "
            f"model's own is {own:g}"
        )
    return float(value)


def check_count(name: str, value: int, largest: int) -> None:
    """Refuse what is no whole number from 1 to ``largest``."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise UserError(f"{name} {value!r}: a whole number from 1 to {largest} is needed")


def check_text(text: str, which: str) -> None:
    """Refuse what is no text in Unicode."""
    if not isinstance(text, str):
        raise UserError(f"{which} is {text!r}; text is needed")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{which} is not valid text: {error.reason}") from error
