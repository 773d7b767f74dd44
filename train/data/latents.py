"""Runs frozen networks over shards of any number and writes shards of what they say.

For each shard of pictures there is one of the same name, written whole or not at all, and a
``NAME.done.json`` that says what it was made from and which samples it lacks: a command that was
killed goes on with the first shard that is not done. Processes on several machines share the work
without a word to each other (``--part 0/4``). ``cache.json`` says what the numbers depend on; a
folder that was made in another way is refused.

Pictures of ``train.distill generate --keep-latents`` bring what their teacher drew: where it is of
the very network that is asked for, and the picture is taken whole, that is kept and not encoded
again. A U-Net's are samples of its autoencoder's Gaussian, so their deviation is zero.
"""

from __future__ import annotations

import json
import logging
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cascade.checkpoints.files import atomic_path, atomic_write_text
from cascade.errors import UserError
from cascade.pipelines.placement import pick_device
from train.data.beside import write_beside
from train.data.buckets import Shape
from train.data.cached import CACHE_FILES
from train.data.config import DataConfig, FilterConfig, filter_differences
from train.data.fingerprint import (
    CACHE_FILE,
    CacheFile,
    Fingerprint,
    differences,
    read_cache_file,
    write_cache_files,
)
from train.data.members import (
    CAPTION_KEY,
    DRAWN_KEY,
    LATENT_KEYS,
    METADATA_KEY,
    SHAPE_KEY,
    array_bytes,
    picture_key,
    read_array,
    read_captions,
    read_metadata,
    scores_of,
)
from train.data.pictures import BROKEN_PICTURE, Fitted, fit_picture
from train.data.resampled import FetchedShard
from train.data.select import Selector
from train.data.sources import check_allowed, expand_shards, scheme_of, shard_title, stamp
from train.data.transport import shown
from train.data.write import add_member
from train.encode import NO_NETWORK, FrozenEncoders, FrozenPaths

_log = logging.getLogger(__name__)

_DECODERS = 4


@dataclass(frozen=True)
class PrecomputeOptions:
    """What ``python -m train.data precompute --shards-out`` does."""

    data: DataConfig
    """Shards, sizes and filters; ``batch_size`` pictures are encoded at once."""
    out: Path
    """Folder for the shards of the cache."""
    frozen: FrozenPaths
    """The networks."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format of the arrays."""
    part: tuple[int, int] = (0, 1)
    """Which of how many processes this is; each does every so-many-th shard."""
    device: str = "cpu"
    """Where the networks run."""

    def __post_init__(self) -> None:
        """Refuse what makes no cache."""
        number, parts = self.part
        if not 0 <= number < parts:
            raise UserError(f"--part {number}/{parts}: parts are numbered from 0")
        if not self.frozen.hashes():
            raise UserError(NO_NETWORK)
        if self.data.crop != "center":
            raise UserError("--crop random: a cache keeps one crop, the middle")


@dataclass
class PrecomputeReport:
    """What was written."""

    shards: int = 0
    samples: int = 0
    skipped: int = 0
    """Samples that could not be used, or that the filters leave out."""
    done_before: int = 0
    """Shards that were there already."""


def precompute_shards(options: PrecomputeOptions) -> PrecomputeReport:
    """Write the cache, or what it still lacks.

    Raises:
        UserError: The folder holds another cache, a network is missing, does not take the pictures
            or gives a value that is not finite, or no sample can be used.
    """
    addresses = expand_shards(options.data.shards)
    check_allowed(addresses, allow_pipe=options.data.allow_pipe, in_pieces=False)
    targets = _targets(addresses, options.out)
    encoders = FrozenEncoders(options.frozen, pick_device(options.device))
    _claim(options, encoders, len(addresses))
    selector = Selector.of(options.data)
    report = PrecomputeReport()
    hashes = options.frozen.hashes()
    number, parts = options.part
    for address, target in list(zip(addresses, targets, strict=True))[number::parts]:
        source = stamp(address) if scheme_of(address) != "pipe" else ""
        if _is_done(target, source):
            report.done_before += 1
            continue
        for old in target.parent.glob(f".{target.name[:32]}.*.tmp"):
            old.unlink(missing_ok=True)  # of a process that was killed
        shard = FetchedShard(address, allow_pipe=options.data.allow_pipe)
        written, skipped = _Writer(options, selector, encoders, hashes).write(shard, target)
        shard.close()
        write_beside(target)
        _mark_done(target, address, source, written, skipped)
        report.shards += 1
        report.samples += written
        report.skipped += sum(map(len, skipped.values()))
    if not report.samples and report.shards and not report.done_before:
        raise UserError(f"{options.data.shards}: not one sample could be used; see {options.out}")
    return report


def _targets(addresses: list[str], out: Path) -> list[Path]:
    titles = [shard_title(address) for address in addresses]
    for address, title in zip(addresses, titles, strict=True):
        if titles.count(title) > 1:
            raise UserError(f"{shown(address)}: another shard is called {title} too; rename one")
    return [out / f"{title}.tar" for title in titles]


def _claim(options: PrecomputeOptions, encoders: FrozenEncoders, shards: int) -> None:
    """Make the folder this cache's, or refuse one that is another's."""
    assert options.data.size is not None, "a streamed DataConfig has a size"
    null_text = encoders.null_text()
    widths = {} if null_text is None else {"text_hidden": null_text[0].shape[-1]}
    if encoders.image is not None:
        widths["image_embeds"] = encoders.image.channels
    fingerprint = Fingerprint(
        weights=options.frozen.hashes(),
        size=options.data.size,
        buckets=options.data.buckets,
        dtype=options.dtype,
        widths=widths,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    earlier = read_cache_file(str(options.out / CACHE_FILE))
    filters: FilterConfig | None = options.data.filters
    if earlier is not None:
        differing = differences(fingerprint, earlier.fingerprint)
        if earlier.filters is not None:
            differing = differing or filter_differences(options.data.filters, earlier.filters)
        else:
            filters = None  # those of the shards that are there are not known
            _log.warning(
                "%s: begun before a cache noted its filters; whether they were these can't be told",
                options.out,
            )
        if differing:
            raise UserError(
                f"{options.out}: holds another cache: {differing}; choose an empty folder"
            )
    elif any(options.out.glob("*.tar")):
        raise UserError(f"{options.out}: holds shards but no {CACHE_FILE}; choose an empty folder")
    write_cache_files(options.out, CacheFile(fingerprint, shards, filters), null_text)


def _done_file(target: Path) -> Path:
    return target.with_name(f"{target.stem}.done.json")


def _is_done(target: Path, source: str) -> bool:
    try:
        done = json.loads(_done_file(target).read_text(encoding="utf-8"))
        return bool(done["source_stamp"] == source and done["bytes"] == target.stat().st_size)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _mark_done(
    target: Path, address: str, source: str, written: int, skipped: dict[str, list[str]]
) -> None:
    done = {
        "source": shown(address),
        "source_stamp": source,
        "bytes": target.stat().st_size,
        "samples": written,
        "skipped": skipped,
    }
    atomic_write_text(_done_file(target), json.dumps(done, indent=1) + "\n")
    count = sum(map(len, skipped.values()))
    reasons = ", ".join(f"{len(keys)} {reason}" for reason, keys in skipped.items())
    _log.info(
        "wrote %s: %d samples%s", target, written, f", {count} left out ({reasons})" * bool(count)
    )


@dataclass
class _Decoded:
    key: str
    fitted: Fitted
    captions: tuple[str, ...]
    scores: dict[str, float]
    drawn: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Parts, keys of ``CACHE_FILES``, that a teacher drew: their tensors by name."""


@dataclass
class _Writer:
    """Writes one shard."""

    options: PrecomputeOptions
    selector: Selector
    encoders: FrozenEncoders
    hashes: dict[str, str]
    """Part -> hash of the network that makes it."""
    skipped: dict[str, list[str]] = field(default_factory=dict)
    written: int = 0

    def write(self, shard: FetchedShard, target: Path) -> tuple[int, dict[str, list[str]]]:
        """Return how many samples were written, and reason -> keys of those that were not."""
        numbers, reasons = self.selector.choose(shard.index)
        for key, reason in zip(shard.index.keys, reasons, strict=True):
            if reason:
                self._skip(key, reason)
        for note in shard.index.notes:
            self._skip(f"(shard) {note}", "not a whole tar file")
        batch_size = self.options.data.batch_size
        # Waiting samples by shape: a batch has one.
        waiting: dict[int, list[_Decoded]] = {}
        with atomic_path(target) as temporary, tarfile.open(temporary, "w") as tar:
            for sample, decoded in self._decoded(shard, np.flatnonzero(numbers >= 0)):
                batch = waiting.setdefault(int(numbers[sample]), [])
                batch.append(decoded)
                if len(batch) == batch_size:
                    self._encode(shard.title, waiting.pop(int(numbers[sample])), tar)
            for number in sorted(waiting):
                self._encode(shard.title, waiting[number], tar)
        return self.written, self.skipped

    def _skip(self, key: str, reason: str) -> None:
        self.skipped.setdefault(reason, []).append(key)

    def _decoded(self, shard: FetchedShard, samples: np.ndarray) -> Iterator[tuple[int, _Decoded]]:
        """Yield the samples that can be decoded, a few batches ahead of the networks."""
        rest = iter(samples.tolist())
        with ThreadPoolExecutor(_DECODERS) as pool:
            while chunk := list(islice(rest, 2 * self.options.data.batch_size)):
                results = pool.map(lambda sample: self._decode(shard, sample), chunk)
                for sample, decoded in zip(chunk, results, strict=True):
                    if isinstance(decoded, _Decoded):
                        yield sample, decoded
                    else:
                        self._skip(shard.index.keys[sample], "a picture that can't be decoded")

    def _decode(self, shard: FetchedShard, sample: int) -> _Decoded | None:
        index = shard.index
        shape = self.selector.buckets.shapes[int(self._number(index, sample))]
        try:
            metadata = read_metadata(_member(shard, sample, METADATA_KEY))
            captions = read_captions(_member(shard, sample, CAPTION_KEY), metadata)
            allowed = tuple(captions[number] for number in self.selector.captions(captions))
            kind = picture_key(index.kinds_of(sample))
            picture = _member(shard, sample, kind) if kind is not None else None
            fitted = fit_picture(picture or b"", shape)
            drawn = self._drawn(shard, sample, metadata) if fitted.original_size == shape else {}
        except BROKEN_PICTURE:
            return None
        return _Decoded(index.keys[sample], fitted, allowed, scores_of(metadata), drawn)

    def _drawn(
        self, shard: FetchedShard, sample: int, metadata: dict[str, Any]
    ) -> dict[str, dict[str, Tensor]]:
        """Return what a teacher drew, of the networks that are asked for."""
        said = metadata.get(DRAWN_KEY)
        hashes = said if isinstance(said, dict) else {}
        found: dict[str, dict[str, Tensor]] = {}
        for part, weights in self.hashes.items():
            if hashes.get(part) != weights:
                continue
            first, *others = CACHE_FILES[part]
            data = _member(shard, sample, LATENT_KEYS[first])
            if data is not None:
                latents = torch.from_numpy(read_array(data)).float()
                zeros = {name: torch.zeros_like(latents) for name in others}
                found[part] = {first: latents, **zeros}
        return found

    def _number(self, index: Any, sample: int) -> int:
        sides = slice(sample, sample + 1)
        return int(self.selector.buckets.of_sizes(index.heights[sides], index.widths[sides])[0])

    def _encode(self, title: str, batch: list[_Decoded], tar: tarfile.TarFile) -> None:
        device = pick_device(self.options.device)
        pixels = torch.stack([one.fitted.pixels for one in batch]).to(device).float().div_(255.0)
        known = set.intersection(*(set(one.drawn) for one in batch))
        parts = self.encoders.encode_pixels(pixels, skip=known)
        captions = [caption for one in batch for caption in one.captions]
        texts = self._texts(captions)
        first = 0
        for row, one in enumerate(batch):
            last = first + len(one.captions)
            arrays = {name: tensor[row] for name, tensor in parts.items()}
            arrays |= {name: tensor[first:last] for name, tensor in texts.items()}
            for drawn in one.drawn.values():
                arrays |= drawn
            first = last
            self._add(tar, title, one, arrays)

    def _texts(self, captions: list[str]) -> dict[str, Tensor]:
        size = self.options.data.batch_size
        chunks = [
            self.encoders.encode_captions(captions[first : first + size])
            for first in range(0, len(captions), size)
        ]
        names = chunks[0] if chunks else {}
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in names}

    def _add(
        self, tar: tarfile.TarFile, title: str, one: _Decoded, arrays: dict[str, Tensor]
    ) -> None:
        for name, tensor in arrays.items():
            stored = tensor.to(getattr(torch, self.options.dtype)).cpu()
            if not bool(torch.isfinite(stored).all()):
                hint = "; try --dtype float32" if bool(torch.isfinite(tensor).all()) else ""
                raise UserError(
                    f"{title}/{one.key}: {name} would hold values that are not finite in "
                    f"{self.options.dtype}; the shard is not written{hint}"
                )
            add_member(tar, f"{one.key}.{LATENT_KEYS[name]}", array_bytes(stored.numpy()))
        shape: Shape = (one.fitted.pixels.shape[1], one.fitted.pixels.shape[2])
        row = {
            **one.scores,
            "captions": list(one.captions),
            SHAPE_KEY: list(shape),
            "original_size": list(one.fitted.original_size),
            "crop": list(one.fitted.crop),
        }
        add_member(tar, f"{one.key}.{CAPTION_KEY}", one.captions[0].encode())
        add_member(tar, f"{one.key}.{METADATA_KEY}", json.dumps(row, sort_keys=True).encode())
        self.written += 1


def _member(shard: FetchedShard, sample: int, kind: str) -> bytes | None:
    if kind not in shard.index.kinds:
        return None
    column = shard.index.kinds.index(kind)
    offset, size = (int(a[sample, column]) for a in (shard.index.offsets, shard.index.sizes))
    return shard.read(offset, size) if offset >= 0 else None
