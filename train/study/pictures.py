"""Pictures that a model made for a report, kept as PNG files so that an interrupted run goes on.

A file's name says what is in it (prompt or key, and seed) and its folder says which weights made
it, so a file is made once and never mistaken for another. What is measured is always what is in
the file: 8-bit pictures, whether they were made just now or an hour ago.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cascade.images import image_to_pixels, open_image, pixels_to_images, save_png

_log = logging.getLogger(__name__)

_TELL_EVERY_S = 20.0

Generate = Callable[[Sequence[str], Sequence[int]], Tensor]
"""Prompts and seeds to pixels ``(B, 3, H, W)`` in [0, 1]."""
Reconstruct = Callable[[Tensor, Sequence[int]], Tensor]
"""Pixels ``(B, 3, H, W)`` in [0, 1] and seeds to pixels of the same shape."""


@dataclass(frozen=True)
class PictureStore:
    """Makes pictures in batches, each at most once."""

    folder: Path
    """Folder for the pictures of one set of weights."""
    generate: Generate
    reconstruct: Reconstruct
    batch_size: int = 8
    reconstruction: str = "reconstructed (A+B)"
    """What tables call the reconstructions."""

    def generated(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Return the pictures of prompts, made with one seed each.

        Returns:
            ``(N, 3, H, W)`` in ``[0, 1]``, on the levels of 8-bit files.
        """
        paths = [
            self.folder / "generated" / f"{_file_stem(prompt)}-seed{seed}.png"
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

        def make(indices: Sequence[int]) -> Tensor:
            return self.generate([prompts[i] for i in indices], [seeds[i] for i in indices])

        return self._made(paths, make)

    def reconstructed(self, keys: Sequence[str], pixels: Tensor, seed: int) -> Tensor:
        """Return the reconstructions of pictures; each key draws its own noise.

        Args:
            keys: One for each picture, and the same picture whenever it comes again.
            pixels: ``(N, 3, H, W)`` in ``[0, 1]``.
            seed: Makes the seeds, together with the keys.

        Returns:
            ``(N, 3, H, W)`` in ``[0, 1]``, on the levels of 8-bit files.
        """
        seeds = [_seed_of(key, seed) for key in keys]
        paths = [
            self.folder / "reconstructed" / f"{_file_stem(key)}-seed{seed}.png" for key in keys
        ]

        def make(indices: Sequence[int]) -> Tensor:
            return self.reconstruct(pixels[list(indices)], [seeds[i] for i in indices])

        return self._made(paths, make)

    def _made(self, paths: Sequence[Path], make: Callable[[Sequence[int]], Tensor]) -> Tensor:
        wanted: dict[Path, int] = {}
        for index, path in enumerate(paths):
            if not path.is_file():
                wanted.setdefault(path, index)
        missing = list(wanted.values())
        told_s = time.monotonic()
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            made = make(batch)
            for index, image in zip(batch, pixels_to_images(made), strict=True):
                paths[index].parent.mkdir(parents=True, exist_ok=True)
                save_png(image, paths[index])
            done = start + len(batch)
            if time.monotonic() - told_s > _TELL_EVERY_S or done == len(missing):
                told_s = time.monotonic()
                _log.info("%s: %d of %d made", paths[0].parent.name, done, len(missing))
        return torch.stack([image_to_pixels(open_image(path)) for path in paths])


def _file_stem(text: str) -> str:
    """Return a readable file name that no other text has."""
    readable = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60]
    return f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _seed_of(key: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
