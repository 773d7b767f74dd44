"""``model.json``: what a model folder holds and how its stages were meant to be sampled.

A model folder holds ``model.json``, ``stage_a``, ``stage_b``, ``stage_c``, ``compressor`` and
``previewer`` as ``.safetensors``, and ``text/``, a transformers text model with its tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

from cascade.checkpoints.files import atomic_write_text, file_hash
from cascade.config import from_dict, to_dict
from cascade.diffusion.schedules import NoiseSchedule, check_schedule, make_schedule
from cascade.errors import UserError
from cascade.text.encoder import TextConfig

SPEC_FILE = "model.json"
CONVERTED_SPEC_FILE = "cascade.json"
"""The same content beside files in other layouts, which have no place for it."""
FAST_DECODER_FILE = "stage_a_fast.safetensors"
"""A small decoder of Stage A's latents, which a model folder may have beside its own."""
NETWORKS = ("stage_a", "stage_b", "stage_c", "compressor", "previewer")
"""Names of a model folder's network files."""
FEW_STEPS = ("stage_b_few", "stage_c_few")
"""Names of the files of networks for few steps, which a folder may hold beside the plain ones."""
Stage = Literal["stage_b", "stage_c"]
ENCODERS = ("text", "text_b", "image_encoder")
"""Names of a model folder's folders; the last two only where a model has them."""
_NO_FILE = re.compile(r"[/\\\x00-\x1f\x7f-\x9f]")
MAX_STEPS = 1000
MAX_GUIDANCE = 1000


@dataclass(frozen=True)
class StageSampling:
    """How one diffusion stage is sampled unless the user says otherwise."""

    sampler: Literal["ddpm", "ddim", "dpmpp_2m", "lcm"] = "ddpm"
    """Sampler; "ddpm" as published, "lcm" of a network that steps were distilled into."""
    steps: int = 20
    """Network evaluations."""
    guidance: float = 4.0
    """Classifier-free guidance scale; 1 switches guidance off."""
    rescale: float = 0.0
    """Share of the guided prediction that is brought back to the conditional one's spread."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Diffusion times between which guidance is applied, both included; a step outside costs one
    pass. Reference: Kynkäänniemi et al., 2024, arXiv:2404.07724."""
    shift: float = 1.0
    """Resolution shift of the noise schedule; 1 is none."""
    prediction: Literal["epsilon", "v", "x0", "flow"] = "epsilon"
    """What the network was trained to predict."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Path from data to noise that it was trained on; "linear" is flow matching's."""
    zero_terminal_snr: bool = False
    """Whether its cosine ends at pure noise instead of the published ``alpha^2 = 1e-4``."""
    times: tuple[float, ...] = ()
    """Decreasing times in [0, 1], one more than steps; empty: equally spaced."""
    time_input: Literal["cosine", "raw"] = "cosine"
    """The time that the network is told: where the unshifted cosine has this noise (the authors'
    v3 code), or the time itself (v2, and diffusers)."""
    last_step: Literal["x0", "mean"] = "x0"
    """What "ddpm" returns: its last estimate of x0 (the authors' v3 code), or the mean of its last
    step (v2, and diffusers)."""
    guidance_range: tuple[float, float] | None = None
    """Guidance scales that were distilled into the network: it needs one pass a step, and is told
    the scale unless both are the same. None: guidance is a second pass."""
    max_steps: int | None = None
    """Most steps that it was distilled for; None: any number will do."""

    def __post_init__(self) -> None:
        """Refuse values that sample nothing."""
        if self.times and len(self.times) != self.steps + 1:
            raise ValueError(
                f"times has {len(self.times)} values; {self.steps} steps need one more"
            )
        falling = all(first > second for first, second in pairwise(self.times))
        if not falling or any(not 0 <= time <= 1 for time in self.times):
            raise ValueError(f"times is {self.times}; times fall, and lie in [0, 1]")
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"steps is {self.steps}; it lies in [1, {MAX_STEPS}]")
        if not 1 <= self.guidance <= MAX_GUIDANCE:
            raise ValueError(f"guidance is {self.guidance}; 1 is off, {MAX_GUIDANCE} the strongest")
        self._check_distilled()
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale is {self.rescale}; it lies in [0, 1]")
        check_interval(self.guidance_interval)
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift is {self.shift}; it must be positive and finite")
        check_schedule(self.schedule, self.prediction, self.zero_terminal_snr)

    def _check_distilled(self) -> None:
        if self.guidance_range is not None:
            low, high = self.guidance_range
            if not 1 <= low <= self.guidance <= high <= MAX_GUIDANCE:
                raise ValueError(
                    f"guidance_range is {self.guidance_range} and guidance {self.guidance}; "
                    f"1 <= low <= guidance <= high <= {MAX_GUIDANCE} must hold"
                )
            if self.rescale > 0:
                raise ValueError(
                    f"rescale is {self.rescale}, but with a guidance_range there is one pass, and "
                    "nothing to compare; set it to 0"
                )
        if self.max_steps is not None and not 1 <= self.steps <= self.max_steps:
            raise ValueError(f"steps is {self.steps}, max_steps {self.max_steps}")

    @property
    def is_guided_by_passes(self) -> bool:
        """Whether each step runs the network twice: with the prompt, and without."""
        return self.guidance != 1 and self.guidance_range is None

    @property
    def walks_whole(self) -> bool:
        """Whether each step was distilled to lead to the next: no other steps will do."""
        return self.max_steps is not None and self.sampler != "lcm"

    def noise_schedule(self) -> NoiseSchedule:
        """Return the path that the samples walk back."""
        return make_schedule(self.schedule, self.shift, zero_terminal_snr=self.zero_terminal_snr)


def check_interval(interval: tuple[float, float]) -> None:
    """Refuse what is no interval of diffusion times.

    Raises:
        ValueError: It is none.
    """
    if len(interval) != 2:
        raise ValueError(f"guidance_interval is {interval}; two times are needed")
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance_interval is {interval}; 0 <= from <= to <= 1 must hold")


def check_name(name: str) -> None:
    """Refuse a model's name that can be no file's: conversions write files of this name.

    Raises:
        ValueError: It is empty, leads to another folder, or has a control character.
    """
    if not name.strip() or name in (".", "..") or _NO_FILE.search(name):
        raise ValueError(
            f"name is {name!r}; files are named after it: write one of letters, digits, - and _, "
            "without / and \\"
        )


def name_of(path: Path) -> str:
    """Return the name of a model that has no settings of its own: its folder's, or its file's."""
    whole = Path(os.path.abspath(path))  # "." has no name; a link's own is meant, not its target's
    return _NO_FILE.sub("_", whole.name if whole.is_dir() else whole.stem).strip() or "model"


def check_sizes(smallest: int, own: int, largest: int, multiple: int) -> None:
    """Refuse sizes of pictures that contradict each other.

    Raises:
        ValueError: Naming the settings.
    """
    sizes = (smallest, own, largest)
    if multiple < 1 or any(size % multiple for size in sizes):
        raise ValueError(
            f"min_size, image_size and max_size are {sizes}; they must be multiples of "
            f"size_multiple={multiple}"
        )
    if not 0 < smallest <= own <= largest:
        raise ValueError(f"min_size <= image_size <= max_size does not hold: {sizes}")


@dataclass(frozen=True)
class CascadeSpec:
    """Everything about a trained cascade that its networks' files do not say."""

    name: str
    """Name of the model, stored in the pictures that it makes."""
    image_size: int
    """Width and height that it was trained at, in pixels; the default of both."""
    pixels_per_stage_c_cell: float
    """Pixels along one side of a Stage C latent cell: 42.67 as published for 1024 px."""
    size_multiple: int = 32
    """Widths and heights are multiples of this many pixels."""
    min_size: int = 64
    """Smallest width and height, in pixels."""
    max_size: int = 4096
    """Largest width and height, in pixels."""
    generation: Literal["v2", "v3"] = "v3"
    """Which generation of the networks it is: v2 is Würstchen's, v3 Stable Cascade's."""
    stage_c_scale: float = 1.0
    """Stage B is told ``z * stage_c_scale - stage_c_shift`` of Stage C's latents z (v2: 42)."""
    stage_c_shift: float = 0.0
    """See ``stage_c_scale`` (v2: 1)."""
    stage_b_cells_per_stage_c_cell: float | None = None
    """Stage A's latent has this many cells along each side for one of Stage C's, rounded down, and
    the picture's size follows from it (diffusers: 10.67). None: it follows the picture's size."""
    stage_c: StageSampling = field(default_factory=StageSampling)
    """Sampling of Stage C."""
    stage_b: StageSampling = field(
        default_factory=lambda: StageSampling(steps=10, guidance=1.1, shift=1.0)
    )
    """Sampling of Stage B."""
    stage_c_few: StageSampling | None = None
    """Sampling of a second Stage C, for few steps, in ``stage_c_few.safetensors``; its
    ``max_steps`` says up to which number of steps it takes the plain one's place."""
    stage_b_few: StageSampling | None = None
    """The same of Stage B."""
    prefers_few: bool = True
    """Whether networks for few steps, where there are some, run unless more steps are asked for."""
    text: TextConfig = field(default_factory=TextConfig)
    """Which text states Stage C was trained on; Stage B too, unless it has its own encoder."""
    text_b: TextConfig | None = None
    """Which states of its own text encoder Stage B was trained on (v2); None: it has none."""
    licence: str = ""
    """Licence of the weights."""

    def __post_init__(self) -> None:
        """Refuse a name that is no file's, and sizes that contradict each other."""
        check_name(self.name)
        if self.size_multiple < 1 or not 1 <= self.pixels_per_stage_c_cell < math.inf:
            raise ValueError(
                f"size_multiple={self.size_multiple} and pixels_per_stage_c_cell="
                f"{self.pixels_per_stage_c_cell} must be at least 1"
            )
        check_sizes(self.min_size, self.image_size, self.max_size, self.size_multiple)
        for name in FEW_STEPS:
            few: StageSampling | None = getattr(self, name)
            if few is not None and few.max_steps is None:
                raise ValueError(f"{name}.max_steps is missing: beyond it the plain network runs")

    def sampling(self, stage: Stage, *, few: bool) -> StageSampling:
        """Return how a stage's plain network, or the one for few steps, is sampled."""
        found: StageSampling | None = getattr(self, f"{stage}_few" if few else stage)
        assert found is not None, f"{self.name} has no {stage}_few"
        return found

    def stage_c_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the Stage C latents of a picture of this height and width."""
        # The tolerance keeps 128 / 21.333 at 6 cells, as 128 * 0.75 / 16 is.
        height, width = (
            max(1, math.ceil(side / self.pixels_per_stage_c_cell - 1e-3)) for side in image_size
        )
        return height, width


def load_spec(folder: Path, name: str = SPEC_FILE) -> CascadeSpec:
    """Read ``model.json`` of a model folder, or ``cascade.json`` of what was converted from one.

    Raises:
        UserError: If the folder holds none, or it is not valid.
    """
    path = folder / name
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: not a cascade's model folder: it holds no {name}") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or absurdly deep
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, Mapping):
        raise UserError(f"{path}: an object with the fields of CascadeSpec is needed")
    return from_dict(CascadeSpec, data, str(path))


def save_spec(spec: CascadeSpec, folder: Path, name: str = SPEC_FILE) -> None:
    """Write ``model.json``, or another name, into a folder, at once or not at all."""
    atomic_write_text(folder / name, json.dumps(to_dict(spec), indent=2) + "\n")


def model_hash(folder: Path) -> str:
    """Return 12 hex digits over the names and contents of a model's weights and settings."""
    digest = hashlib.sha256()
    own = {SPEC_FILE, *(f"{name}.safetensors" for name in (*NETWORKS, *FEW_STEPS))}
    paths = [path for path in folder.iterdir() if path.name in own]
    paths += [path for name in ENCODERS for path in folder.glob(f"{name}/*")]
    for path in sorted(paths):
        if path.suffix in {".safetensors", ".json"} and path.is_file():
            digest.update(f"{path.relative_to(folder).as_posix()} {file_hash(path)}\n".encode())
    return digest.hexdigest()[:12]
