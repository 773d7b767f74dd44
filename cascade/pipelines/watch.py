"""What a user sees and hears while pictures are made: bars, previews, seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cascade.diffusion.samplers import OnStep, StepInfo
from cascade.images import pixels_to_images
from cascade.pipelines.results import Preview

OnPreview = Callable[[Preview], None]


@dataclass
class Clock:
    """Seconds by stage; waits for the GPU, whose work is only queued otherwise."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Measure what happens inside."""
        started_s = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        self.seconds[stage] = time.perf_counter() - started_s


@dataclass(frozen=True)
class Watch:
    """Follows one batch of pictures."""

    batch: range
    """Positions of its pictures in the plan."""
    num_pictures: int
    """Pictures of the whole plan."""
    progress: bool | None
    """Whether bars are shown; None: if stderr is a terminal."""
    on_preview: OnPreview | None
    """Takes previews."""
    preview_every: int
    """Steps between previews."""

    @contextmanager
    def stage(self, name: str, num_steps: int) -> Iterator[OnStep]:
        """Show a bar for a stage, on stderr; gives what counts its steps.

        The bar is taken away at the end, however that comes.
        """
        if self.progress is False or (self.progress is None and not sys.stderr.isatty()):
            yield lambda info: None
            return
        from tqdm import tqdm

        label = name
        if self.num_pictures > 1:
            label = f"picture {self.batch[-1] + 1} of {self.num_pictures}, {name}"
        with tqdm(total=num_steps, desc=label, leave=False, file=sys.stderr) as bar:

            def count(info: StepInfo) -> None:
                bar.update(1)

            yield count

    def wants_preview(self, info: StepInfo) -> bool:
        """Whether a preview is due after this step."""
        last = info.index + 1 == info.num_steps
        due = last or (info.index + 1) % self.preview_every == 0
        return due and self.on_preview is not None

    def show(self, info: StepInfo, pixels: Tensor) -> None:
        """Hand previews, ``(B, 3, h, w)``, to the user."""
        assert self.on_preview is not None, "asked for by wants_preview"
        images = pixels_to_images(pixels)
        self.on_preview(Preview(images, tuple(self.batch), info.index + 1, info.num_steps))
