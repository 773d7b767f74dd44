"""Draws the curve of ``reencode-bias``, with Pillow alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from train.distill.bias_curve import BiasCurve

_WIDTH, _HEIGHT = 520, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 40, 48
_RATIO, _DISTANCE, _FAINT, _INK = "#1f5fa8", "#b4541a", "#c8c8c8", "#202020"


@dataclass(frozen=True)
class _Panel:
    """One pair of axes."""

    draw: ImageDraw.ImageDraw
    left: int
    span: tuple[float, float]
    top: float
    """Largest value of the upright axis, which starts at 0."""

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the place of a point in pixels."""
        low, high = self.span
        across = (x - low) / (high - low)
        wide, high_px = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return (
            self.left + _LEFT + across * wide,
            _TOP + (1 - min(y, self.top) / self.top) * high_px,
        )

    def line(self, points: Sequence[tuple[float, float]], color: str) -> None:
        """Draw a curve with its points."""
        placed = [self.at(*point) for point in points]
        self.draw.line(placed, fill=color, width=2)
        for x, y in placed:
            self.draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=color)

    def axes(self, title: str, ticks: Sequence[float], show: Callable[[float], str]) -> None:
        """Draw the frame, its numbers and what is on the level axis."""
        low, high = self.span
        self.draw.rectangle((*self.at(low, self.top), *self.at(high, 0.0)), outline=_INK)
        for tick in ticks:
            x, y = self.at(tick, 0.0)
            self.draw.line((x, y, x, y + 4), fill=_INK)
            self.draw.text((x, y + 6), show(tick), fill=_INK, anchor="ma")
        for step in range(5):
            value = self.top * step / 4
            x, y = self.at(low, value)
            self.draw.line((x - 4, y, x, y), fill=_INK)
            self.draw.text((x - 7, y), f"{value:.2f}", fill=_INK, anchor="rm")
        middle = self.at((low + high) / 2, 0.0)
        self.draw.text((middle[0], middle[1] + 24), title, fill=_INK, anchor="ma")


def bias_picture(curve: BiasCurve, min_ratio: float) -> Image.Image:
    """Return two plots side by side: ratio and distance against t, and against log-SNR.

    Args:
        curve: Measured.
        min_ratio: Drawn as a level line.
    """
    image = Image.new("RGB", (2 * _WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    points = curve.points
    times = [(point.timestep + 1) / 1000 for point in points]
    snrs = [point.log_snr for point in points]
    highest = max(1.0, *(max(point.ratio, point.distance) for point in points))
    top = min(2.0, 1.1 * highest)
    quarters = [min(snrs) + (max(snrs) - min(snrs)) * step / 4 for step in range(5)]
    plots = (
        ("t of the teacher (0: the picture)", times, (0.0, 1.0), [0, 0.25, 0.5, 0.75, 1.0], 2),
        ("log-SNR of the teacher's latents", snrs, (min(snrs), max(snrs)), quarters, 1),
    )
    for number, (title, xs, span, ticks, digits) in enumerate(plots):
        panel = _Panel(draw, number * _WIDTH, span, top)
        panel.axes(title, ticks, lambda value, digits=digits: f"{value:.{digits}f}")  # type: ignore[misc]
        draw.line((*panel.at(span[0], min_ratio), *panel.at(span[1], min_ratio)), fill=_FAINT)
        panel.line([(x, p.ratio) for x, p in zip(xs, points, strict=True)], _RATIO)
        panel.line([(x, p.distance) for x, p in zip(xs, points, strict=True)], _DISTANCE)
    draw.text((_LEFT, 12), "spread of the re-encoded estimate over the truth's", fill=_RATIO)
    draw.text((_WIDTH + _LEFT, 12), "squared distance over the truth's variance", fill=_DISTANCE)
    return image
