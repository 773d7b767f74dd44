"""Sampling here and in diffusers: seconds by stage and end to end, memory, roofline, start-up.

``python -m benchmarks.sampling`` runs each part of each model (Stage C, Stage B and Stage A, or
U-Net and autoencoder) on all sides, in turn, in one process, over the same weights, and adds the
parts up. Text is not encoded on either side: its states are drawn. Sides: "here" is what our
pipelines run; "diffusers" its networks in its pipelines' loops, as they are; on a GPU also
"diffusers, compiled", its networks through torch.compile, "here, graphs", ours as ``sample.py
--cuda-graphs`` has them, and "here, compiled", with ``--compile`` as well. Before the clock all
sides predict the same thing, and the differences are printed; if one is large the exit code is 1.

A loop is all steps of a part, with what is done once a picture. ``--loop-steps`` runs only so many
of them and computes the others; such rows are marked. "times" is diffusers' median divided by the
row's: above 1 is faster. The roofline is the operations that a loop needs at least (attention
included; text keys and such once) at the rate of a large matrix product, measured in this run.
Memory is the peak of a warm loop above what was there before: of a GPU what the allocator gave, on
a CPU the resident set. Stage B is not guided, as in diffusers' pipelines unless told otherwise.

``--quick`` takes two cores less than five minutes: the demonstration, Stable Cascade lite at 512 px
and KOALA-700M at 256 px with cut loops, and the start-up, in bfloat16; where a CPU has no
instructions for it in float32, with fewer repeats, about five. At the end it says which aims hold.

On a CPU each side has its memory as its own programs ask for it: ours as ``sample.py`` does
(``cascade/cpu_memory.py``), diffusers' as the system gives it. ``--memory shared`` gives both what
``sample.py`` asks for, ``--memory plain`` neither.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cascade.cpu_memory import tune_cpu_memory  # noqa: E402

if __name__ == "__main__" and not {"plain", "--memory=plain"} & set(sys.argv):
    tune_cpu_memory()  # some of what follows makes tensors

from benchmarks import start_up  # noqa: E402
from benchmarks.sampling_aims import Aim, judge  # noqa: E402
from benchmarks.sampling_measure import BOUNDS, Case, Row, matmul_rate, measure  # noqa: E402
from benchmarks.sampling_memory import MEMORIES, SideMemory  # noqa: E402
from benchmarks.sampling_models import MODELS, CascadeModel, Model  # noqa: E402
from benchmarks.sampling_sides import HERE  # noqa: E402
from cascade.checkpoints.files import atomic_write_text  # noqa: E402
from cascade.command import Parser, parse_all  # noqa: E402
from cascade.config import nearest  # noqa: E402
from cascade.errors import UserError, run_main  # noqa: E402
from cascade.evaluate.provenance import commit, machine  # noqa: E402
from cascade.pipelines.placement import computes_bfloat16  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
_QUICK = {
    "demo": Case("demo", 128, 1, torch.bfloat16, repeats=5),
    "stable_cascade_lite": Case(
        "stable_cascade_lite", 512, 1, torch.bfloat16, repeats=3, loop_steps=2
    ),
    "koala_700m": Case("koala_700m", 256, 1, torch.bfloat16, repeats=3, loop_steps=2),
}
_QUICK_START_UPS, _START_UPS = 2, 5
_SIZE_MULTIPLE = 128
"""Picture sides are multiples of this, so that every level of every network halves evenly."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: For a model, number, format or device that can't be.
    """
    parser = Parser(
        prog="benchmarks/sampling.py", description="Sampling here and in diffusers, side by side."
    )
    parser.add_argument("--models", help=f"of {', '.join(MODELS)}; comma-separated; default all")
    parser.add_argument("--quick", action="store_true", help="two cores, five minutes: see above")
    parser.add_argument("--size", metavar="PX", help="sides; default 1024, on a CPU 512")
    parser.add_argument("--batch-size", metavar="N", help="pictures at once, as 1,8; default 1")
    parser.add_argument(
        "--dtype",
        help=f"of {', '.join(DTYPES)}; or both; default bfloat16, on a CPU without it float32",
    )
    parser.add_argument("--steps-c", type=int, metavar="N", help="Stage C's; default: the model's")
    parser.add_argument("--steps-b", type=int, metavar="N", help="Stage B's")
    parser.add_argument("--steps", type=int, metavar="N", help="a U-Net's")
    parser.add_argument(
        "--loop-steps", type=int, metavar="N", help="run N steps of a loop, compute the others"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="loops a side; default 5")
    parser.add_argument(
        "--start-up", type=int, metavar="N", help="processes of each kind; 0 leaves them out"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compiled", action="store_true", help="both compiled as well; on a GPU always"
    )
    parser.add_argument(
        "--compile-mode", choices=COMPILE_MODES, default="reduce-overhead", help="of diffusers"
    )
    parser.add_argument(
        "--memory", choices=tuple(MEMORIES), default="own", help="of a CPU's sides: see above"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and inputs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all figures go as well")
    options = parse_all(parser, sys.argv[1:] if arguments is None else arguments)
    if options.quick:
        for name in ("size", "batch_size", "dtype"):
            if getattr(options, name) is not None:
                raise UserError(f"--quick has its own --{name.replace('_', '-')}; leave one out")
    known = tuple(_QUICK if options.quick else MODELS)
    if options.models is None:
        options.models = ",".join(known)
    options.models = _words(options, "models", known)
    for name in ("steps_c", "steps_b", "steps", "loop_steps", "repeats"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
    if options.loop_steps == 1:
        raise UserError(
            "--loop-steps 1: the first step holds what is done once a picture; at least 2 are "
            "needed to tell what another one takes"
        )
    if options.start_up is not None and options.start_up < 0:
        raise UserError(f"--start-up {options.start_up}: 0 or more")
    try:
        options.device = torch.device(options.device)
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {options.device}: {str(error).splitlines()[0]}") from error
    in_hardware = computes_bfloat16(options.device)
    options.dtype = options.dtype or ("bfloat16" if in_hardware else "float32")
    options.dtypes = [DTYPES[name] for name in _words(options, "dtype", tuple(DTYPES))]
    options.size = options.size or ("512" if options.device.type == "cpu" else "1024")
    options.sizes = _numbers(options.size, "--size", _SIZE_MULTIPLE)
    options.batch_sizes = _numbers(options.batch_size or "1", "--batch-size", 1)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: its folder is not there; make it first")
    return options


def _words(options: argparse.Namespace, name: str, known: Sequence[str]) -> list[str]:
    words: list[str] = getattr(options, name).split(",")
    for word in words:
        if word not in known:
            guess = nearest(word, known)
            hint = f"did you mean {guess!r}? " if guess else ""
            raise UserError(f"--{name} {word!r}: {hint}of {', '.join(known)}")
    return words


def _numbers(text: str, name: str, multiple: int) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(f"{name} {text!r}: whole numbers with commas between them") from error
    for number in numbers:
        if number < 1 or number % multiple:
            what = "at least 1" if multiple == 1 else f"multiples of {multiple}"
            raise UserError(f"{name} {number}: {what}, please")
    return numbers


def cases_of(options: argparse.Namespace, model: Model, key: str) -> list[Case]:
    """Return how a model is to be run."""
    if options.quick:
        cases = [_QUICK[key]]
        if not computes_bfloat16(options.device):  # it would take hours
            repeats = 5 if key == "demo" else 2  # in float32 the others take twice as long
            cases = [replace(_QUICK[key], dtype=torch.float32, repeats=repeats)]
        elif key == "demo":
            cases.insert(0, replace(_QUICK[key], dtype=torch.float32))
    else:
        cases = [
            Case(key, px, batch_size, dtype, repeats=5)
            for px in (options.sizes if model.size is None else [model.size])
            for batch_size in options.batch_sizes
            for dtype in options.dtypes
        ]
    told = {
        name: getattr(options, name)
        for name in ("steps", "steps_c", "steps_b", "loop_steps", "repeats")
        if getattr(options, name) is not None
    }
    return [replace(case, **told) for case in cases]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and the aims, write the JSON."""
    options = parse(arguments)
    device: torch.device = options.device
    origin = {"seed": str(options.seed), "commit": commit(), "machine": machine(device)}
    origin["libraries"] = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("diffusers", "transformers")
    )
    if device.type == "cpu":
        origin["memory"] = MEMORIES[options.memory]
    print("Sampling; " + ", ".join(f"{name} {value}" for name, value in origin.items()))
    compiles = options.compiled or device.type == "cuda"
    memory = SideMemory(options.memory)
    rates: dict[torch.dtype, float] = {}
    rows: list[Row] = []
    for key in options.models:
        model = MODELS[key]()
        for case in cases_of(options, model, key):
            if case.dtype not in rates:
                rates[case.dtype] = matmul_rate(device, case.dtype)
                said = f"{rates[case.dtype] / 1e12:.3g} TFLOP/s"
                print(f"matrix products in {_name(case.dtype)}: {said}")
            print(f"\n{heading(case, model)}\n{COLUMNS}", flush=True)
            mode = options.compile_mode if compiles else None
            rate = rates[case.dtype]
            for row in measure(case, model, device, options.seed, rate, mode, memory.give):
                rows.append(row)
                print(line(row), flush=True)
    default = _QUICK_START_UPS if options.quick else _START_UPS
    repeats = default if options.start_up is None else options.start_up
    memory.give(HERE)  # processes that this one starts inherit what it has
    started = start_up.measure(repeats) if repeats else []
    if started:
        print("\n" + "\n".join(start_up.table(started)))
    aims = judge(rows, started, device.type)
    print("\naims")
    for aim in aims:
        print(aim_line(aim))
    if options.json is not None:
        content = {
            "benchmark": "sampling",
            **origin,
            "device": str(device),
            "arguments": [str(word) for word in (sys.argv[1:] if arguments is None else arguments)],
            "matmul_flops_per_s": {_name(dtype): rate for dtype, rate in rates.items()},
            "rows": [{**asdict(row), "step_s": row.step_s} for row in rows],
            "start_up": [asdict(one) for one in started],
            "aims": [asdict(aim) for aim in aims],
        }
        atomic_write_text(options.json, json.dumps(content, indent=1) + "\n")
    wrong = [row for row in rows if not row.difference <= BOUNDS[DTYPES[row.dtype]]]
    for row in wrong:
        print(f"error: {row.model}, {row.part}, {row.side}: predictions differ", file=sys.stderr)
    return 1 if wrong else 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


COLUMNS = (
    f"{'':12}{'':20}{'median s':>10}{'least':>9}{'quartiles':>18}{'a step s':>10}"
    f"{'times':>7}{'roofline':>9}{'peak MB':>9}{'differs':>9}"
)


def heading(case: Case, model: Model) -> str:
    """Name a case."""
    if isinstance(model, CascadeModel):
        steps = (
            f"{case.steps_c or model.steps_c} steps of C, guidance {model.guidance_c:g}, "
            f"{case.steps_b or model.steps_b} of B, guidance {model.guidance_b:g}"
        )
    else:
        sampling = model.sampling
        steps = f"{case.steps or sampling.steps} steps, guidance {sampling.guidance:g}"
    cut = f" ({case.loop_steps} of them run)" if case.loop_steps else ""
    return (
        f"{model.title}, {case.px} px, batch {case.batch_size}, {_name(case.dtype)}; "
        f"{steps}{cut}; {case.repeats} repeats a side"
    )


def line(row: Row) -> str:
    """Return a row of the table."""
    quartiles = f"{row.seconds.lower:.3f} to {row.seconds.upper:.3f}"
    peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
    return (
        f"{row.part:12}{row.side:20}{row.seconds.median:10.3f}{row.least_s:9.3f}{quartiles:>18}"
        f"{row.step_s:10.4f}{row.times_diffusers:7.2f}{row.roofline_share:9.1%}{peak:>9}"
        f"{row.difference:9.0e}"
        + (f"  computed from {row.steps_run} of {row.steps} steps" if row.is_computed else "")
    )


def aim_line(aim: Aim) -> str:
    """Return what is printed of an aim."""
    if aim.holds is None:
        return f"  not measured  {aim.text}"
    return f"  {'holds ' if aim.holds else 'MISSED'}        {aim.text}: {aim.found}"


if __name__ == "__main__":
    raise SystemExit(run_main(main))
