"""Which picture sizes a model can make, and what to say about the others."""

from __future__ import annotations

from typing import Protocol

from cascade.errors import UserError


class Sized(Protocol):
    """What a model says of the sizes of its pictures; all in pixels."""

    @property
    def image_size(self) -> int:
        """Width and height that it was trained at."""
        ...

    @property
    def size_multiple(self) -> int:
        """Widths and heights are multiples of it."""
        ...

    @property
    def min_size(self) -> int:
        """Smallest side."""
        ...

    @property
    def max_size(self) -> int:
        """Largest side."""
        ...


def fit_size(spec: Sized, width: int | None, height: int | None) -> tuple[int, int, list[str]]:
    """Turn a wanted size into one that the model makes.

    A size within the model's range is rounded to the nearest multiple, and the change is told; one
    outside is refused, since a picture of a much different size is not what was asked for.

    Args:
        spec: The model.
        width: Wanted width in pixels; None is the model's own.
        height: Wanted height in pixels; None is the model's own.

    Returns:
        Width and height in pixels, and a notice for each change.

    Raises:
        UserError: For a size outside the model's range, naming valid sizes near it.
    """
    notices: list[str] = []
    fitted = []
    for name, wanted in (("width", width), ("height", height)):
        size = spec.image_size if wanted is None else _fit_side(spec, name, wanted)
        if wanted is not None and size != wanted:
            notices.append(
                f"{name} {wanted} becomes {size}: this model makes multiples of "
                f"{spec.size_multiple} pixels"
            )
        fitted.append(size)
    if is_far(spec, fitted[0], fitted[1]):
        notices.append(
            f"{fitted[0]}x{fitted[1]} is far from the {spec.image_size}x{spec.image_size} pixels "
            "that this model was trained at: expect odd pictures"
        )
    return fitted[0], fitted[1], notices


def is_far(spec: Sized, width: int, height: int) -> bool:
    """Tell whether a size is so far from the trained one that pictures come out odd."""
    return max(width, height) > 2 * spec.image_size or 2 * min(width, height) < spec.image_size


def _fit_side(spec: Sized, name: str, wanted: int) -> int:
    if isinstance(wanted, bool) or not isinstance(wanted, int):
        raise UserError(f"{name} {wanted!r}: a whole number of pixels is needed")
    if not spec.min_size <= wanted <= spec.max_size:
        near = ", ".join(str(size) for size in _sizes_near(spec, wanted))
        raise UserError(
            f"{name} {wanted}: this model makes {spec.min_size} to {spec.max_size} pixels in steps "
            f"of {spec.size_multiple}; valid sizes near it: {near}"
        )
    # Halves go up; both ends are multiples, so that rounding stays inside.
    return (wanted + spec.size_multiple // 2) // spec.size_multiple * spec.size_multiple


def _sizes_near(spec: Sized, wanted: int) -> list[int]:
    """Return up to three valid sizes at the end of the range that is nearest to ``wanted``."""
    step = spec.size_multiple
    if wanted < spec.min_size:
        sizes = range(spec.min_size, spec.max_size + 1, step)[:3]
    else:
        sizes = range(spec.max_size, spec.min_size - 1, -step)[:3]
    return sorted(sizes)
