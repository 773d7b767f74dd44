"""The options of ``sample.py``, and which of them go together; imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cascade.command import Parser, parse_all
from cascade.errors import UserError

DEMO_MODEL = Path(__file__).resolve().parents[1] / "weights" / "demo"
ONLY_CASCADES = {
    "steps_c": "--steps",
    "steps_b": "--steps",
    "guidance_c": "--guidance",
    "guidance_b": "--guidance",
    "control": "",
    "dialect": "",
    "fast_decoder": "",
}
"""Options that a U-Net has no use for, and which of its own are meant."""
ONLY_UNETS = {
    "steps": "--steps-c and --steps-b",
    "guidance": "--guidance-c and --guidance-b",
    "spacing": "",
    "unet": "",
    "lora": "",
    "original_size": "",
    "crop": "",
    "target_size": "",
}
"""The same of a cascade."""
_OF_WHOLE_CASCADES = (
    *("steps_b", "guidance_b", "fast_decoder", "dialect", "image", "control"),
    *("preview", "compile", "cuda_graphs", "offload", "vram", "int8"),
)
NOT_OF_LATENTS = {
    **ONLY_UNETS,
    **dict.fromkeys(_OF_WHOLE_CASCADES, ""),
    "steps": "--steps-c",
    "guidance": "--guidance-c",
}
"""The same of a Stage C on an autoencoder's latents."""


def make_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(
        prog="sample.py",
        description="Make pictures of prompts with a cascade, by default the embedded one, or with "
        "a U-Net: SD, SDXL, and students of theirs.",
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
        "reconstruct: compress it and bring it back (default: inpaint with --mask, else img2img; a "
        "U-Net has img2img alone)",
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
        help="how much is drawn anew, above 0 and up to 1 (default: 0.8 for img2img, else 1); of a "
        "U-Net the share of its steps that are walked",
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
    how.add_argument(
        "--steps-c",
        type=int,
        metavar="N",
        help="steps of Stage C: what is seen; where a model has a second one for few steps, few "
        "take that, more the plain one",
    )
    how.add_argument(
        "--steps-b", type=int, metavar="N", help="steps of Stage B: how finely; as --steps-c"
    )
    how.add_argument(
        "--guidance-c", type=float, metavar="X", help="how strictly Stage C obeys; 1 is off"
    )
    how.add_argument(
        "--guidance-b", type=float, metavar="X", help="how strictly Stage B obeys; 1 is off"
    )
    how.add_argument(
        "--guidance-interval",
        type=two_times,
        metavar="FROM:TO",
        help="diffusion times, 0 to 1, between which Stage C or a U-Net is guided; each step "
        "outside costs one pass in place of two",
    )
    how.add_argument(
        "--sampler",
        metavar="NAME",
        help="ddpm, ddim or dpmpp_2m, for both stages, or lcm where steps were distilled; of a "
        "U-Net euler, euler_ancestral, ddim, "
        "dpmpp_2m or lcm",
    )

    how.add_argument(
        "--fast-decoder",
        action="store_true",
        default=None,
        help="decode with the model's small decoder, stage_a_fast.safetensors, not Stage A's",
    )

    unet = parser.add_argument_group("how to make it with a U-Net")
    unet.add_argument("--steps", type=int, metavar="N", help="steps")
    unet.add_argument(
        "--guidance", type=float, metavar="X", help="how strictly it obeys; 1 is off, and faster"
    )
    unet.add_argument(
        "--spacing", metavar="NAME", help="where the timesteps lie: leading, trailing or linspace"
    )
    unet.add_argument(
        "--unet",
        type=Path,
        metavar="FILE",
        help="run this U-Net in place of the model's own, such as one of SDXL-Lightning's",
    )
    unet.add_argument(
        "--lora",
        type=lora_and_weight,
        action="append",
        metavar="FILE[:WEIGHT]",
        help="a LoRA, by PEFT's or kohya's names, and how much of it counts (default 1); may be "
        "repeated",
    )
    unet.add_argument(
        "--original-size",
        type=two_sides,
        metavar="WxH",
        help="what SDXL is told of the picture before it was cropped (default: the picture's size)",
    )
    unet.add_argument(
        "--crop",
        type=two_sides,
        metavar="XxY",
        help="what SDXL is told of the crop's left and top (default: 0x0)",
    )
    unet.add_argument(
        "--target-size",
        type=two_sides,
        metavar="WxH",
        help="what SDXL is told of the picture (default: its size)",
    )

    where = parser.add_argument_group("with what, and where to")
    where.add_argument(
        "--model",
        default=str(DEMO_MODEL),
        metavar="MODEL",
        help="model folder, single file of SD or SDXL, or organisation/name on the hub, which is "
        "the only thing here that uses the network; with :lite at its end, the smaller stages; of "
        "the hub with @REVISION after that (default: weights/demo)",
    )
    where.add_argument(
        "--variant",
        metavar="NAME",
        help="number format to download where the model has several, such as bf16",
    )
    where.add_argument(
        "--dialect",
        choices=("official", "diffusers"),
        help="published weights: sampled as their authors do, or as diffusers does (default: "
        "official)",
    )
    where.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps"
    )
    where.add_argument(
        "--dtype",
        default="auto",
        metavar="NAME",
        help="auto, float32, bfloat16, float16; or by stage, as in "
        "stage_c=bfloat16,stage_b=float32 or unet=float16,autoencoder=float32, the rest being auto",
    )
    where.add_argument(
        "--compile",
        action="store_true",
        help="compile the networks first, which takes minutes and pays for many pictures; what it "
        "cost and saves is measured and said",
    )
    where.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="record the kernels of a step and launch them as one, which pays where a GPU waits "
        "for the host: small networks, one picture at a time",
    )
    where.add_argument(
        "--offload",
        choices=("none", "model", "sequential"),
        help="where weights are while they do not work: none: on the device as well; model: each "
        "network is there for its stage alone; sequential: layer by layer, the least memory and "
        "the most time (default: as --vram needs it, else none)",
    )
    where.add_argument(
        "--int8",
        action="store_true",
        default=None,
        help="keep the linear layers of Stage C and B, or of the U-Net, in int8: half the memory "
        "of bfloat16, and pictures that differ a little",
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
        help="keep a rough NAME.preview.png up to date while Stage C, or the U-Net, runs",
    )
    return parser


def two_sides(text: str) -> tuple[int, int]:
    """Return the height and width, or top and left, of ``WxH``."""
    first, _, second = text.lower().partition("x")
    if not (first.isdecimal() and second.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no WxH in pixels, such as 1024x768")
    return int(second), int(first)


def two_times(text: str) -> tuple[float, float]:
    """Return both numbers of ``FROM:TO``."""
    first, _, second = text.partition(":")
    try:
        return float(first), float(second)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no FROM:TO, such as 0.2:0.8") from None


def lora_and_weight(text: str) -> tuple[Path, float]:
    """Return the file and the weight of ``FILE[:WEIGHT]``, whose file may have colons in its name.

    What is there as a whole is a file; else what is behind the last colon is a weight, if it is a
    number.
    """
    before, _, behind = text.rpartition(":")
    if before and not Path(text).exists():
        try:
            return Path(before), float(behind)
        except ValueError:  # then it is a name, which is not there, unless what is before it is
            if Path(before).exists():
                raise argparse.ArgumentTypeError(
                    f"{text!r}: {behind!r} is no weight; write a number, as in {before}:0.8"
                ) from None
    return Path(text), 1.0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        UserError: For what the parser does not know, naming the nearest option.
    """
    return parse_all(make_parser(), argv, stray="put a prompt of several words in quotes; ")


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


def refuse_options(options: argparse.Namespace, others: dict[str, str], what: str) -> None:
    """Refuse options that a model has no use for.

    Raises:
        UserError: Naming the option, and the model's own where it has one.
    """
    for name, own in others.items():
        if getattr(options, name) not in (None, False):
            flag = f"--{name.replace('_', '-')}"
            hint = f"; it takes {own}" if own else "; leave it out"
            raise UserError(f"{flag}: {options.model} is {what}{hint}")
