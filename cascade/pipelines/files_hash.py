"""Hashes over what a model is made of, and over nothing that only lies beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from cascade.checkpoints.readers import CONFIG_FILE, is_index, read_json, weights_in

_HASHED_BYTES = 1 << 20
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


def sampled_hash(path: Path) -> str:
    """Hash a file's size and 16 blocks spread over it."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for index in range(16):
            file.seek(max(0, (size - _HASHED_BYTES) * index // 15))
            digest.update(file.read(_HASHED_BYTES))
    return digest.hexdigest()


def text_files(folder: Path, tokens: Path) -> list[Path]:
    """Return the files of a text encoder and its tokenizer that are read, as far as they are there.

    Args:
        folder: Of the encoder.
        tokens: Of the tokenizer; it may be the same.

    Raises:
        UserError: If the encoder has no weights.
    """
    weights = weights_in(folder)
    shards = sorted(set(read_json(weights)["weight_map"].values())) if is_index(weights) else []
    paths = [folder / CONFIG_FILE, weights, *(folder / str(shard) for shard in shards)]
    return [*paths, *tokenizer_files(tokens)]


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a tokenizer that are there."""
    return [path for name in _TOKENIZER_FILES if (path := folder / name).is_file()]


def hash_of_files(root: Path, paths: Iterable[Path], content: Callable[[Path], str]) -> str:
    """Return 12 hex digits over the names and the contents of files.

    Args:
        root: Folder that they lie in.
        paths: The files, in any order.
        content: Hash of a file.
    """
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        digest.update(f"{path.relative_to(root).as_posix()} {content(path)}\n".encode())
    return digest.hexdigest()[:12]
