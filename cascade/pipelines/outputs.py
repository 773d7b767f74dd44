"""Where finished pictures go: numbered files in a folder, or the one file that was named."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cascade.errors import UserError, describe_os_error
from cascade.images import image_grid, save_png
from cascade.pipelines.plan import Request
from cascade.pipelines.results import Picture

_OTHER_FORMATS = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"}
_NUMBERED = re.compile(r"(\d{4,})-.*\.png")


@dataclass(frozen=True)
class Outputs:
    """The files of one run, settled before anything is computed."""

    paths: tuple[Path | None, ...]
    """File of each picture; None if only the grid is kept."""
    grid: Path | None
    """File of the grid, if there is one."""

    @classmethod
    def prepare(cls, out: Path, requests: Sequence[Request], *, grid: bool) -> Outputs:
        """Settle the names and make sure that they can be written.

        Args:
            out: A folder, made if it is missing, in which nothing is ever replaced; or a file
                ``NAME.png``, which is replaced when the picture is finished. With a grid the
                file is the grid's.
            requests: The pictures.
            grid: Whether all pictures are also laid out in one.

        Raises:
            UserError: If ``out`` cannot take the pictures.
        """
        suffix = out.suffix.lower()
        if suffix in _OTHER_FORMATS:
            raise UserError(f"{out}: pictures are written as PNG; name {out.with_suffix('.png')}")
        if suffix == ".png" and not out.is_dir():
            if len(requests) > 1 and not grid:
                raise UserError(
                    f"{out}: one file for {len(requests)} pictures; name a folder, or add --grid"
                )
            _make_writable(out.parent)
            _check_name(out)
            paths = [None] * len(requests) if grid else [out]
            return cls(tuple(paths), out if grid else None)
        _make_writable(out)
        first = 1 + max((_number(path) for path in out.glob("*.png")), default=0)
        names = (
            f"{first + index:04d}-{_slug(request.prompt)}-seed{request.seed}.png"
            for index, request in enumerate(requests)
        )
        grid_path = out / f"{first + len(requests):04d}-grid.png" if grid else None
        return cls(tuple(out / name for name in names), grid_path)

    def save(self, index: int, picture: Picture) -> Path | None:
        """Write a finished picture with its text; gives the file."""
        path = self.paths[index]
        if path is not None:
            save_png(picture.image, path, picture.metadata)
        return path

    def save_preview(self, index: int, image: Image.Image) -> Path:
        """Write or replace the preview of a picture, beside where the picture will be."""
        path = self.paths[index] or self.grid
        assert path is not None, "a run without a grid has a file for each picture"
        path = path.with_suffix(".preview.png")
        save_png(image, path)
        return path

    def save_grid(self, pictures: Sequence[Picture]) -> Path | None:
        """Write the grid of the finished pictures, if one was asked for and there are any."""
        if self.grid is None or not pictures:
            return None
        lines = [f"seed {picture.seed}: {picture.prompt}" for picture in pictures]
        shared = {
            key: value
            for key, value in pictures[0].metadata.items()
            if key not in ("prompt", "seed")
        }
        text = {"pictures": "\n".join(lines), **shared}
        save_png(image_grid([picture.image for picture in pictures]), self.grid, text)
        return self.grid


def _make_writable(folder: Path) -> None:
    """Make a folder and try to write in it, so that no computing is lost on a wrong one."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file, not a folder; choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = describe_os_error(error)
        if reason is None:
            raise
        raise UserError(f"{folder}: can't be written to: {reason.split(': ', 1)[-1]}") from error


def _check_name(file: Path) -> None:
    """Refuse a name that the file system does not take."""
    try:
        file.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        reason = describe_os_error(error) or str(error)
        raise UserError(f"{file}: can't be written: {reason.split(': ', 1)[-1]}") from error


def _number(path: Path) -> int:
    match = _NUMBERED.fullmatch(path.name)
    return int(match[1]) if match else 0


def _slug(prompt: str) -> str:
    """Return a short, safe file name of a prompt."""
    words = re.sub(r"[^\w]+", "-", prompt.strip()[:200].lower()).strip("-_")
    while len(words.encode()) > 48:
        words = words[:-1]
    return words.strip("-_") or "picture"
