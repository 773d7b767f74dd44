"""Shapes of about one area, and which of them a picture is cropped to.

All pictures of a step have one shape, the same on all ranks. A picture goes to the shape whose
ratio is nearest to its own on a logarithmic scale: twice as wide and half as wide are equally far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from train.data.config import BucketConfig

Shape = tuple[int, int]
"""Height and width in pixels."""


def _sorted(shapes: set[Shape]) -> tuple[Shape, ...]:
    return tuple(sorted(shapes, key=lambda shape: (shape[1] / shape[0], shape)))


@dataclass(frozen=True)
class Buckets:
    """The shapes of a run, from the tallest to the widest."""

    shapes: tuple[Shape, ...]

    @classmethod
    def of(cls, size: int, config: BucketConfig | None) -> Buckets:
        """Return the square of ``size``, and with ``config`` the shapes beside it.

        For each width that is a multiple of the step, the height is the multiple that brings the
        area nearest to ``size`` squared.
        """
        if config is None:
            return cls(((size, size),))
        if config.shapes:
            return cls(_sorted({(size, size), *((h, w) for w, h in config.shapes)}))
        step, shapes = config.step, {(size, size)}
        for width in range(step, math.ceil(size * config.max_aspect) + step, step):
            height = max(step, round(size * size / width / step) * step)
            # Both orders: a set of shapes that has 832x1216 has 1216x832.
            if max(width, height) <= config.max_aspect * min(width, height):
                shapes |= {(height, width), (width, height)}
        return cls(_sorted(shapes))

    def of_sizes(self, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """Return for each picture's size the number of its shape, int64 ``(N,)``."""
        own = np.log(np.maximum(widths, 1) / np.maximum(heights, 1))
        ratios = np.array([math.log(width / height) for height, width in self.shapes])
        return np.abs(own[:, None] - ratios[None]).argmin(axis=1)

    def of_shapes(self, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """Return for each size the number of the shape that equals it; -1 for none."""
        numbers = np.full(len(heights), -1)
        for number, (height, width) in enumerate(self.shapes):
            numbers[(heights == height) & (widths == width)] = number
        return numbers

    def name(self, number: int) -> str:
        """Return a shape as ``WIDTHxHEIGHT``."""
        height, width = self.shapes[number]
        return f"{width}x{height}"
