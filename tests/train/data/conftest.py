"""Sets of shards to stream: of several shapes, and one with everything wrong."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIZES = [(32, 32), (48, 24), (24, 48), (33, 31), (64, 40), (20, 40)]
"""Widths and heights."""


def encoded(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def colored(number: int, size: tuple[int, int]) -> Image.Image:
    """A picture that tells its number by its colour."""
    return Image.new("RGB", size, (number % 256, number // 256 * 40, 7 * number % 256))


def write_members(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_set(folder: Path, counts: list[int], sizes: list[tuple[int, int]] = SIZES) -> str:
    """Shards of so many pictures each, as img2dataset writes them; return their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        members = []
        for _ in range(count):
            key = f"{number:06d}"
            size = sizes[number % len(sizes)]
            wordings = [f"number {number}", f"the {number}th picture"]
            row = {"captions": wordings, "aesthetic": number % 10, "width": size[0]}
            members += [
                (f"{key}.png", encoded(colored(number, size))),
                (f"{key}.txt", wordings[0].encode()),
                (f"{key}.json", json.dumps(row).encode()),
            ]
            number += 1
        write_members(folder / f"{shard:05d}.tar", members)
    return f"{folder}/*.tar"


@pytest.fixture(autouse=True)
def own_index_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """No test reads or writes the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user-cache")))


@pytest.fixture(scope="session")
def several_shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five shards of 61 pictures in six sizes."""
    return write_set(tmp_path_factory.mktemp("several"), [13, 5, 20, 1, 22])


def gradient(width: int, height: int) -> Image.Image:
    row = np.linspace(0, 255, width, dtype=np.uint8)
    return Image.fromarray(np.stack([np.tile(row, (height, 1))] * 3, axis=-1))
