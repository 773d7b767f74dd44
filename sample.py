"""From a prompt to a PNG: ``python sample.py --prompt "a flat icon of a blue fish"``.

Thin: it reads the command line, checks what can be checked before anything is computed, lets
:class:`cascade.pipelines.cascade.CascadePipeline` or, where the model is one,
:class:`cascade.pipelines.unet.UNetPipeline` work, and saves each picture when it is finished.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.cpu_memory import tune_cpu_memory
from cascade.errors import UserError, run_main
from cascade.sample_options import (
    NOT_OF_LATENTS,
    ONLY_CASCADES,
    ONLY_UNETS,
    check_picture_options,
    parse,
    refuse_options,
)

if TYPE_CHECKING:
    from cascade.checkpoints.hub import ModelFiles
    from cascade.pipelines.cascade import CascadePipeline
    from cascade.pipelines.control_input import ControlInput
    from cascade.pipelines.picture_input import PictureInput
    from cascade.pipelines.plan import Plan, Request, Settings
    from cascade.pipelines.results import Picture, Preview
    from cascade.pipelines.unet import UNetPipeline
    from cascade.pipelines.unet_plan import UNetPlan

STAGE_TITLES = {
    "text": "text",
    "stage_c": "Stage C",
    "stage_b": "Stage B",
    "stage_a": "Stage A",
    "unet": "U-Net",
    "autoencoder": "autoencoder",
}


@dataclass(frozen=True)
class Job:
    """What a command line asks of a model, settled before its networks are loaded."""

    requests: Sequence[Request]
    notices: Sequence[str]
    start: Callable[[Callable[[Preview], None] | None], Started]
    """Loads the networks; what it takes is given previews."""


@dataclass(frozen=True)
class Started:
    """A loaded model at work."""

    title: str
    memory: str
    """How its memory is planned."""
    notices: Sequence[str]
    pictures: Iterator[Picture]


def read_prompts(options: argparse.Namespace) -> list[str]:
    """Return the prompts of the command line, then those of the file.

    Raises:
        UserError: If there are none, or the file cannot be read.
    """
    prompts: list[str] = list(options.prompt)
    path: Path | None = options.prompts_file
    if path is not None:
        try:
            # With or without a byte order mark; only a line break ends a prompt, whatever Unicode
            # calls a line, as in str.splitlines.
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError:
            raise UserError(f"{path}: not a text file in UTF-8") from None
        stripped = (line.strip() for line in lines)
        found = [line for line in stripped if line and not line.startswith("#")]
        if not found:
            raise UserError(f"{path}: no prompts in it; write one a line")
        prompts += found
    if not prompts and options.mode in ("variation", "reconstruct"):
        return [""]
    if not prompts:
        without = "" if options.image is None else " (--mode variation and reconstruct need none)"
        raise UserError(
            f'no prompt given{without}; for instance --prompt "a 3D render of a red apple"'
        )
    return prompts


def read_picture(options: argparse.Namespace) -> PictureInput | None:
    """Open the picture and the mask of the command line."""
    if options.image is None:
        return None
    from cascade.images import open_image
    from cascade.pipelines.picture_input import PictureInput

    mask = None if options.mask is None else open_image(options.mask)
    return PictureInput(open_image(options.image), options.mode, mask, options.strength)


def read_control(options: argparse.Namespace) -> ControlInput | None:
    """Open the picture of the command line's ControlNet."""
    if options.control is None:
        return None
    from cascade.images import open_image
    from cascade.pipelines.control_input import ControlInput

    image = None if options.control_image is None else open_image(options.control_image)
    strength = 1.0 if options.control_strength is None else options.control_strength
    return ControlInput(options.control, image, strength)


def cascade_settings(options: argparse.Namespace) -> Settings:
    """Return what the command line sets of a cascade, or of its Stage C alone."""
    from cascade.pipelines.plan import Settings

    return Settings(
        negative_prompt=options.negative_prompt,
        seed=options.seed,
        num_images=options.num_images,
        steps_c=options.steps_c,
        steps_b=options.steps_b,
        guidance_c=options.guidance_c,
        guidance_b=options.guidance_b,
        guidance_interval=options.guidance_interval,
        sampler=options.sampler,
        width=options.width,
        height=options.height,
    )


def cascade_job(options: argparse.Namespace, prompts: list[str], files: ModelFiles) -> Job:
    """Settle what a cascade is to make."""
    from cascade.pipelines.parts import open_source
    from cascade.pipelines.placement import pick_device, pick_dtypes
    from cascade.pipelines.plan import make_plan

    pick_dtypes(options.dtype, pick_device(options.device))
    given, control = read_picture(options), read_control(options)
    source = open_source(
        files, dialect=options.dialect or "official", fast_decoder=bool(options.fast_decoder)
    )
    settings = cascade_settings(options)
    plan = make_plan(source.spec, prompts, settings, picture=given, control=control)

    def start(on_preview: Callable[[Preview], None] | None) -> Started:
        from cascade.pipelines.cascade import CascadePipeline

        pipeline = CascadePipeline(
            source,
            device=options.device,
            dtype=options.dtype,
            offload=options.offload,
            vram=options.vram,
            int8=bool(options.int8),
            few=plan.few,
        )
        asked = options.offload or options.vram is not None
        memory = pipeline.arrange(plan).describe() if asked else ""
        memory = hastened(pipeline, plan, options) or memory
        title = f"{pipeline.spec.name} on {pipeline.device}{steps_said(plan)}"
        return Started(title, memory, (), pipeline.run(plan, on_preview=on_preview))

    return Job(plan.requests, plan.notices, start)


def hastened(
    pipeline: CascadePipeline | UNetPipeline, plan: Plan | UNetPlan, options: argparse.Namespace
) -> str:
    """Compile a pipeline's networks or record their passes; say what compiling cost and saves."""
    report = ""
    if options.compile:
        from cascade.pipelines.compiling import compile_pipeline

        said = (
            "compiling the networks; this takes minutes, and the first picture is made four times"
        )
        print(said, file=sys.stderr, flush=True)
        report = compile_pipeline(pipeline, plan).describe()
    if options.cuda_graphs:
        from cascade.pipelines.compiling import use_cuda_graphs

        use_cuda_graphs(pipeline)
    return report


def steps_said(plan: Plan) -> str:
    """Say which networks run where a model has two for a stage, and in how many steps."""
    if not plan.few:
        return ""
    said = [
        f"{STAGE_TITLES[name]} for few steps, {getattr(plan, name).steps}"
        for name in ("stage_c", "stage_b")
        if name in plan.few
    ]
    return f" ({'; '.join(said)})"


def latent_job(options: argparse.Namespace, prompts: list[str], folder: Path) -> Job:
    """Settle what a Stage C on an autoencoder's latents is to make."""
    from cascade.pipelines.latent import LatentPipeline
    from cascade.pipelines.plan import make_plan

    pipeline = LatentPipeline(folder, device=options.device, dtype=options.dtype)
    plan = make_plan(pipeline.spec, prompts, cascade_settings(options))

    def start(_: Callable[[Preview], None] | None) -> Started:
        title = f"{pipeline.spec.name} on {pipeline.device}"
        return Started(title, "", (), pipeline.run(plan))

    return Job(plan.requests, plan.notices, start)


def unet_job(options: argparse.Namespace, prompts: list[str], files: ModelFiles) -> Job:
    """Settle what a U-Net is to make."""
    from cascade.pipelines.placement import pick_device, pick_unet_dtypes
    from cascade.pipelines.unet_lora import LoraChoice
    from cascade.pipelines.unet_parts import open_unet_source
    from cascade.pipelines.unet_plan import UNetSettings, make_unet_plan

    pick_unet_dtypes(options.dtype, pick_device(options.device))
    given = read_picture(options)
    loras = [LoraChoice(path, weight) for path, weight in options.lora or ()]
    source = open_unet_source(files, options.unet, loras)
    settings = UNetSettings(
        negative_prompt=options.negative_prompt,
        seed=options.seed,
        num_images=options.num_images,
        steps=options.steps,
        guidance=options.guidance,
        guidance_interval=options.guidance_interval,
        sampler=options.sampler,
        spacing=options.spacing,
        width=options.width,
        height=options.height,
        original_size=options.original_size,
        crop=options.crop,
        target_size=options.target_size,
    )
    plan = make_unet_plan(source.spec, prompts, settings, picture=given)

    def start(on_preview: Callable[[Preview], None] | None) -> Started:
        from cascade.pipelines.unet import UNetPipeline

        pipeline = UNetPipeline(
            source,
            device=options.device,
            dtype=options.dtype,
            offload=options.offload,
            vram=options.vram,
            int8=bool(options.int8),
        )
        asked = options.offload or options.vram is not None
        memory = pipeline.arrange(plan).describe() if asked else ""
        memory = hastened(pipeline, plan, options) or memory
        title = f"{pipeline.spec.name} on {pipeline.device}"
        return Started(title, memory, pipeline.notices, pipeline.run(plan, on_preview=on_preview))

    return Job(plan.requests, plan.notices, start)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the pictures that the command line asks for."""
    options = parse(sys.argv[1:] if argv is None else argv)
    check_picture_options(options)
    prompts = read_prompts(options)
    tune_cpu_memory()
    # Libraries log what they have to say, such as the words of a prompt that is too long.
    logging.basicConfig(level=logging.WARNING, format="notice: %(message)s")

    # What follows costs seconds to import, so that --help and slips come first.
    from cascade.checkpoints.hub import refuse_lite, resolve
    from cascade.pipelines.latent import is_latent
    from cascade.pipelines.offload import check_request
    from cascade.pipelines.outputs import Outputs
    from cascade.pipelines.placement import check_dtype, pick_device
    from cascade.pipelines.unet_parts import is_unet

    device = pick_device(options.device)
    check_dtype(options.dtype, device)  # a slip must not wait for a download
    check_request(options.offload, options.vram, device)
    if options.compile:
        from cascade.compiled import check_stays

        check_stays("--compile", options.offload, options.vram)
    if options.cuda_graphs:
        from cascade.cuda_graphs import check_graphs

        check_graphs(device, options.offload, options.vram)
    files = resolve(options.model, variant=options.variant)
    if is_latent(files.folders[0]):
        refuse_lite(files, "a Stage C on an autoencoder's latents")
        refuse_options(options, NOT_OF_LATENTS, "a Stage C on an autoencoder's latents")
        job = latent_job(options, prompts, files.folders[0])
    elif is_unet(files):
        refuse_options(options, ONLY_CASCADES, "a U-Net")
        job = unet_job(options, prompts, files)
    else:
        refuse_options(options, ONLY_UNETS, "a cascade")
        job = cascade_job(options, prompts, files)
    outputs = Outputs.prepare(options.out, job.requests, grid=options.grid)
    for notice in job.notices:
        print(f"notice: {notice}", file=sys.stderr)

    def on_preview(preview: Preview) -> None:
        for index, image in zip(preview.indices, preview.images, strict=True):
            outputs.save_preview(index, image)

    started_s = time.perf_counter()
    started = job.start(on_preview if options.preview else None)
    for notice in started.notices:
        print(f"notice: {notice}", file=sys.stderr)
    if started.memory:
        print(started.memory)
    ready_s = time.perf_counter() - started_s
    print(f"{started.title}, ready in {ready_s:.1f} s")

    num_finished = 0
    in_grid: list[Picture] = []
    exit_code = 0
    try:
        for picture in started.pictures:
            path = outputs.save(num_finished, picture)
            num_finished += 1
            if options.grid:  # only then is a picture kept in memory
                in_grid.append(picture)
            print(describe(picture, path), flush=True)
    except KeyboardInterrupt:
        print(f"stopped: {num_finished} of {len(job.requests)} pictures kept", file=sys.stderr)
        exit_code = 130
    except Exception:
        if num_finished:
            print(f"{num_finished} of {len(job.requests)} pictures kept", file=sys.stderr)
            outputs.save_grid(in_grid)
        raise
    grid = outputs.save_grid(in_grid)
    if grid is not None:
        print(f"{grid}  {len(in_grid)} pictures")
    return exit_code


def describe(picture: Picture, path: Path | None) -> str:
    """Say where a picture is, its seed, and the seconds of each stage."""
    where = path or f'"{picture.prompt}"'
    seconds = ", ".join(
        f"{STAGE_TITLES[stage]} {value:.2f} s" for stage, value in picture.seconds.items()
    )
    return f"{where}  seed {picture.seed}  ({seconds})"


if __name__ == "__main__":
    sys.exit(run_main(main))
