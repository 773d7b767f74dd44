"""From a prompt to a PNG: ``python sample.py --prompt "a flat icon of a blue fish"``.

Thin: it reads the command line, checks what can be checked before anything is computed, lets
:class:`cascade.pipelines.cascade.CascadePipeline` work, and saves each picture when it is finished.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.command import Parser, parse_all
from cascade.errors import UserError, run_main

if TYPE_CHECKING:
    from cascade.pipelines.control_input import ControlInput
    from cascade.pipelines.picture_input import PictureInput
    from cascade.pipelines.results import Picture, Preview

DEMO_MODEL = Path(__file__).resolve().parent / "weights" / "demo"
STAGE_TITLES = {"text": "text", "stage_c": "Stage C", "stage_b": "Stage B", "stage_a": "Stage A"}


def make_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(
        prog="sample.py",
        description="Make pictures of prompts with a cascade, by default the embedded one.",
        epilog="The same command with the same seed gives the same bytes. Each PNG carries its "
        "prompt, seed and settings as text. Ctrl-C keeps the pictures that are finished.",
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to make")
    what.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated"
    )
    what.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="text file with a prompt a line; empty lines and lines with a leading # are skipped",
    )
    what.add_argument(
        "--negative-prompt", default="", metavar="TEXT", help="what to steer away from"
    )
    what.add_argument(
        "--num-images", type=int, default=1, metavar="N", help="pictures a prompt (default 1)"
    )
    what.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="seed of each prompt's first picture, the next ones count up (default: a fresh one)",
    )
    what.add_argument("--width", type=int, metavar="PX", help="default: the model's own")
    what.add_argument("--height", type=int, metavar="PX", help="default: the model's own")

    start = parser.add_argument_group("from a picture")
    start.add_argument(
        "--image", type=Path, metavar="FILE", help="a picture to start from (see --mode)"
    )
    start.add_argument(
        "--mode",
        choices=("img2img", "variation", "inpaint", "outpaint", "reconstruct"),
        metavar="NAME",
        help="img2img: change it by the prompt; variation: another one like it; inpaint: draw the "
        "white part of --mask anew; outpaint: draw what is around it, up to --width and --height; "
        "reconstruct: compress it and bring it back (default: inpaint with --mask, else img2img)",
    )
    start.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        help="as large as --image: white is drawn anew, black is kept, to the pixel where the size "
        "is one that the model makes",
    )
    start.add_argument(
        "--strength",
        type=float,
        metavar="X",
        help="how much is drawn anew, above 0 and up to 1 (default: 0.8 for img2img, else 1)",
    )
    start.add_argument(
        "--control",
        type=Path,
        metavar="FILE",
        help="a ControlNet of Stable Cascade (canny, inpainting or super-resolution, told by its "
        "content), which leads Stage C by --control-image",
    )
    start.add_argument(
        "--control-image", type=Path, metavar="FILE", help="what it looks at (default: --image)"
    )
    start.add_argument(
        "--control-strength", type=float, metavar="X", help="0 is no control (default 1)"
    )

    how = parser.add_argument_group("how to make it (default: as the model's makers chose)")
    how.add_argument("--steps-c", type=int, metavar="N", help="steps of Stage C: what is seen")
    how.add_argument("--steps-b", type=int, metavar="N", help="steps of Stage B: how finely")
    how.add_argument(
        "--guidance-c", type=float, metavar="X", help="how strictly Stage C obeys; 1 is off"
    )
    how.add_argument(
        "--guidance-b", type=float, metavar="X", help="how strictly Stage B obeys; 1 is off"
    )
    how.add_argument("--sampler", metavar="NAME", help="ddpm, ddim or dpmpp_2m, for both stages")

    where = parser.add_argument_group("with what, and where to")
    where.add_argument(
        "--model",
        default=str(DEMO_MODEL),
        metavar="MODEL",
        help="model folder, or organisation/name on the hub, which is the only thing here that "
        "uses the network; with :lite at its end, the smaller stages; of the hub with @REVISION "
        "after that (default: weights/demo)",
    )
    where.add_argument(
        "--variant",
        metavar="NAME",
        help="number format to download where the model has several, such as bf16",
    )
    where.add_argument(
        "--dialect",
        choices=("official", "diffusers"),
        default="official",
        help="published weights: sampled as their authors do, or as diffusers does (default: "
        "%(default)s)",
    )
    where.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps"
    )
    where.add_argument(
        "--dtype",
        default="auto",
        metavar="NAME",
        help="auto, float32, bfloat16, float16; or by stage, as in "
        "stage_c=bfloat16,stage_b=float32, the rest being auto",
    )
    where.add_argument(
        "--offload",
        choices=("none", "model", "sequential"),
        help="where weights are while they do not work: none: on the device as well; model: each "
        "network is there for its stage alone; sequential: layer by layer, the least memory and "
        "the most time (default: as --vram needs it, else none)",
    )
    where.add_argument(
        "--vram",
        type=float,
        metavar="GIB",
        help="make do with this much of the GPU's memory: the fastest plan that fits is picked, "
        "and said",
    )
    where.add_argument(
        "--out",
        type=Path,
        default=Path("outputs"),
        metavar="PATH",
        help="folder, in which pictures are numbered and nothing is replaced; or FILE.png, which "
        "is replaced if it is there (default: outputs)",
    )
    where.add_argument(
        "--grid", action="store_true", help="also all pictures in one; alone if --out is a file"
    )
    where.add_argument(
        "--preview",
        action="store_true",
        help="keep a rough NAME.preview.png up to date while Stage C runs",
    )
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        UserError: For what the parser does not know, naming the nearest option.
    """
    return parse_all(make_parser(), argv, stray="put a prompt of several words in quotes; ")


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


def check_picture_options(options: argparse.Namespace) -> None:
    """Refuse options that lack the picture they are about, and settle the mode.

    Raises:
        UserError: Naming the option that is missing.
    """
    if options.image is None:
        given = [
            name for name in ("mode", "mask", "strength") if getattr(options, name) is not None
        ]
        if given:
            raise UserError(f"--{given[0]} is about a picture; name it with --image FILE")
    elif options.mode is None:
        options.mode = "img2img" if options.mask is None else "inpaint"
    elif options.mode == "reconstruct" and options.preview:
        raise UserError("--preview shows Stage C at work, which a reconstruction does not run")
    if options.control is None:
        given = [
            name
            for name in ("image", "strength")
            if getattr(options, f"control_{name}") is not None
        ]
        if given:
            raise UserError(
                f"--control-{given[0]} is about a ControlNet; name it with --control FILE"
            )


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


def main(argv: Sequence[str] | None = None) -> int:
    """Make the pictures that the command line asks for."""
    options = parse(sys.argv[1:] if argv is None else argv)
    check_picture_options(options)
    prompts = read_prompts(options)
    # Libraries log what they have to say, such as the words of a prompt that is too long.
    logging.basicConfig(level=logging.WARNING, format="notice: %(message)s")

    # What follows costs seconds to import, so that --help and slips come first.
    from cascade.checkpoints.hub import resolve
    from cascade.pipelines.offload import check_request
    from cascade.pipelines.outputs import Outputs
    from cascade.pipelines.parts import open_source
    from cascade.pipelines.placement import pick_device, pick_dtypes
    from cascade.pipelines.plan import Settings, make_plan

    device = pick_device(options.device)
    pick_dtypes(options.dtype, device)  # a slip must not wait for a download
    check_request(options.offload, options.vram, device)
    given, control = read_picture(options), read_control(options)
    files = resolve(options.model, variant=options.variant)
    source = open_source(files, dialect=options.dialect)
    settings = Settings(
        negative_prompt=options.negative_prompt,
        seed=options.seed,
        num_images=options.num_images,
        steps_c=options.steps_c,
        steps_b=options.steps_b,
        guidance_c=options.guidance_c,
        guidance_b=options.guidance_b,
        sampler=options.sampler,
        width=options.width,
        height=options.height,
    )
    plan = make_plan(source.spec, prompts, settings, picture=given, control=control)
    outputs = Outputs.prepare(options.out, plan.requests, grid=options.grid)
    for notice in plan.notices:
        print(f"notice: {notice}", file=sys.stderr)

    started_s = time.perf_counter()
    from cascade.pipelines.cascade import CascadePipeline

    pipeline = CascadePipeline(
        source,
        device=options.device,
        dtype=options.dtype,
        offload=options.offload,
        vram=options.vram,
    )
    if options.offload or options.vram is not None:
        print(pipeline.arrange(plan).describe())
    ready_s = time.perf_counter() - started_s
    print(f"{pipeline.spec.name} on {pipeline.device}, ready in {ready_s:.1f} s")

    def on_preview(preview: Preview) -> None:
        for index, image in zip(preview.indices, preview.images, strict=True):
            outputs.save_preview(index, image)

    num_finished = 0
    in_grid: list[Picture] = []
    exit_code = 0
    try:
        for picture in pipeline.run(plan, on_preview=on_preview if options.preview else None):
            path = outputs.save(num_finished, picture)
            num_finished += 1
            if options.grid:  # only then is a picture kept in memory
                in_grid.append(picture)
            print(describe(picture, path), flush=True)
    except KeyboardInterrupt:
        print(f"stopped: {num_finished} of {len(plan.requests)} pictures kept", file=sys.stderr)
        exit_code = 130
    except Exception:
        if num_finished:
            print(f"{num_finished} of {len(plan.requests)} pictures kept", file=sys.stderr)
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
