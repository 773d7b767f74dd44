"""A whole (small) data set in memory: pictures, captions, cached latents and text states.

Training a cascade on two CPU cores or one GPU must not spend its hours on decoding and frozen
encoders. ``load_pictures`` reads shards once; ``train.data.precompute`` adds what frozen networks
make of them; ``CachedLoader`` serves batches whose content is a function of (seed, step) alone,
so that a resumed run goes on with the batch that it would have seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from cascade.errors import UserError
from train.data.config import DataConfig
from train.data.select import check_broken
from train.data.shards import ShardReader
from train.draws import derived_seed


@dataclass
class Pictures:
    """All pictures of the shards, in the order of the shards.

    ``groups`` numbers the distinct caption lists: two pictures of one group can't be told apart by
    text, so a contrastive loss must not push them apart.
    """

    keys: list[str]
    pixels: Tensor  # uint8 (N, 3, H, W)
    captions: list[tuple[str, ...]]
    groups: Tensor  # int64 (N,)
    num_broken: int = 0
    """Samples of the shards that could not be used."""

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.keys)

    def fingerprint(self) -> str:
        """Return a hash of the keys, captions and size, by which a cache knows its pictures."""
        digest = hashlib.sha256(str(tuple(self.pixels.shape)).encode())
        for key, captions in zip(self.keys, self.captions, strict=True):
            digest.update(json.dumps([key, *captions]).encode())
        return digest.hexdigest()[:12]

    @cached_property
    def pixels_hash(self) -> str:
        """Hash of the pixels: two subjects' pictures may have the same keys and captions.

        Older caches have none; they are known by the fingerprint alone.
        """
        return hashlib.sha256(self.pixels.contiguous().numpy().data).hexdigest()[:12]


def load_pictures(shards: str, max_broken_share: float = 1.0) -> Pictures:
    """Read every picture of the shards into memory.

    Args:
        shards: Glob or brace pattern.
        max_broken_share: Share of samples that may be broken.

    Raises:
        UserError: No shard matches, no picture is left, too many are broken, or they differ in
            size.
    """
    reader = ShardReader(shards)
    samples = list(reader)
    if not samples:
        raise UserError(f"{shards}: no readable picture with a caption; check the shards")
    broken = reader.report.broken
    check_broken(broken, len(samples) + broken.total(), max_broken_share, shards)
    shapes = {tuple(sample.pixels.shape) for sample in samples}
    if len(shapes) > 1:
        raise UserError(
            f"{shards}: pictures of {len(shapes)} sizes ({sorted(shapes)[:3]}...); "
            "write the shards again with --size"
        )
    numbers: dict[tuple[str, ...], int] = {}
    groups = [numbers.setdefault(sample.captions, len(numbers)) for sample in samples]
    return Pictures(
        keys=[sample.key for sample in samples],
        pixels=torch.stack([sample.pixels for sample in samples]),
        captions=[sample.captions for sample in samples],
        groups=torch.tensor(groups),
        num_broken=broken.total(),
    )


@dataclass
class CachedBatch:
    """One batch, from memory or from a stream; what neither holds is None."""

    captions: list[str]
    groups: Tensor  # (B,)
    pixels: Tensor | None = None  # (B, 3, H, W) in [0, 1]
    stage_a_latents: Tensor | None = None  # (B, 4, H/4, W/4)
    stage_c_latents: Tensor | None = None  # (B, 16, h, w)
    autoencoder_mean: Tensor | None = None  # (B, 4, H/8, W/8), scaled
    autoencoder_std: Tensor | None = None  # of the same shape; a U-Net learns samples
    text_hidden: Tensor | None = None  # (B, L, D)
    text_pooled: Tensor | None = None  # (B, P)
    image_embeds: Tensor | None = None  # (B, E)
    teacher_features: Tensor | None = None  # (B, C, h, w), of a U-Net that saw the clean picture
    keys: list[str] | None = None
    """``SHARD/KEY`` of each sample of a stream."""
    original_sizes: Tensor | None = None
    """Height and width of each picture file of a stream, (B, 2)."""
    loss_weights: Tensor | None = None
    """How much each sample counts, (B,), where two sets are served side by side."""
    crops: Tensor | None = None
    """Top and left edge of each crop of a stream, in pixels of the resized picture, (B, 2)."""
    drawn: dict[str, int] | None = None
    """Of a mixture: rows of this step over all ranks by set."""
    lost: dict[str, int] | None = None
    """Of a stream: samples that this rank came upon and left out on the way to this batch, by
    ``train.data.select.LOST_KINDS``."""

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.captions)

    def pin_memory(self) -> CachedBatch:
        """Move the tensors to memory from which a CUDA device can copy beside its work."""
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Tensor):
                setattr(self, one.name, value.pin_memory())
        return self

    def require(self, part: str) -> Tensor:
        """Return a part.

        Raises:
            ValueError: The data were loaded without it.
        """
        tensor = getattr(self, part)
        if tensor is None:
            raise ValueError(f"the batch has no {part}: the data were loaded without it")
        return tensor


@dataclass
class Cache:
    """Pictures with what frozen networks made of them."""

    pictures: Pictures
    tensors: dict[str, Tensor] = field(default_factory=dict)
    caption_rows: dict[str, int] = field(default_factory=dict)
    null_text: tuple[Tensor, Tensor] | None = None  # hidden (L, D), pooled (P,) of ""

    def batch(self, indices: Tensor, draws: Sequence[float]) -> CachedBatch:
        """Gather the pictures at ``indices``; numbers in [0, 1) choose a caption of each."""
        captions = []
        for index, draw in zip(indices.tolist(), draws, strict=True):
            choices = self.pictures.captions[index]
            captions.append(choices[int(draw * len(choices))])
        batch = CachedBatch(
            captions=captions,
            groups=self.pictures.groups[indices],
            pixels=self.pictures.pixels[indices].float().div_(255.0),
        )
        rows = indices
        if self.caption_rows:
            rows = torch.tensor([self.caption_rows[caption] for caption in captions])
        for name, tensor in self.tensors.items():
            chosen = rows if name in CACHE_FILES["text"] else indices
            setattr(batch, name, tensor[chosen].float())
        return batch


CACHE_FILES = {
    "text": ("text_hidden", "text_pooled"),
    "stage_a": ("stage_a_latents",),
    "stage_c": ("stage_c_latents",),
    "autoencoder": ("autoencoder_mean", "autoencoder_std"),
    "image": ("image_embeds",),
    "teacher": ("teacher_features",),
}
"""File of a cache folder -> tensors in it."""
_PRECOMPUTE = {
    "text": "--text FOLDER",
    "stage_a": "--stage-a FILE",
    "stage_c": "--compressor FILE",
    "autoencoder": "--autoencoder FILE",
    "image": "--image FOLDER",
    "teacher": "--teacher-of CONFIG",
}
"""Part -> option of precompute that makes it."""


def load_cache(config: DataConfig, expect: dict[str, str]) -> Cache:
    """Load pictures and the cached parts that a run needs.

    Args:
        config: Shards and cache folder.
        expect: Part, a key of ``CACHE_FILES`` -> hash of the weights that must have made it.

    Raises:
        UserError: A part is missing, or was made from other pictures or other weights.
    """
    pictures = load_pictures(config.shards, config.max_broken_share)
    cache = Cache(pictures)
    for part, weights_hash in expect.items():
        if config.folder is None:
            raise UserError("data.folder: this run trains on a cache; name its folder")
        path = Path(config.folder) / f"{part}.safetensors"
        if not path.is_file():
            raise UserError(
                f"{path}: not there; make it with: python -m train.data precompute --shards "
                f"'{config.shards}' --out {config.folder} {_PRECOMPUTE[part]} (the weights that "
                "this run names)"
            )
        metadata, tensors = _read_part(path)
        found = (metadata.get("pictures"), metadata.get("weights"))
        if found != (pictures.fingerprint(), weights_hash):
            raise UserError(
                f"{path}: made from pictures {found[0]} with weights {found[1]}, but this run has "
                f"{pictures.fingerprint()} and {weights_hash}; precompute it again"
            )
        if "pixels" in metadata and metadata["pixels"] != pictures.pixels_hash:
            raise UserError(
                f"{path}: made from other pictures of the same names and captions; precompute it "
                "again"
            )
        cache.tensors.update({name: tensors[name] for name in CACHE_FILES[part]})
        if part == "text":
            captions = json.loads(metadata["captions"])
            cache.caption_rows = {caption: row for row, caption in enumerate(captions)}
            row = cache.caption_rows[""]
            cache.null_text = (tensors["text_hidden"][row], tensors["text_pooled"][row])
    return cache


def _read_part(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return metadata and tensors of a file of ``train.data precompute``.

    Raises:
        UserError: It is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return metadata, load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); make the cache again") from error


class _EndlessBatches(IterableDataset[CachedBatch]):
    """Batch number ``step`` of an endless series of shuffled epochs."""

    def __init__(
        self, cache: Cache, config: DataConfig, start_step: int, rank: int, world: int
    ) -> None:
        self.cache = cache
        self.config = config
        self.start_step = start_step
        self.rank = rank
        self.world = world
        if len(cache.pictures) < config.batch_size * world:
            raise UserError(
                f"data.batch_size is {config.batch_size} on {world} device(s), but the shards "
                f"hold {len(cache.pictures)} pictures"
            )

    def __iter__(self) -> Iterator[CachedBatch]:
        size, seed = self.config.batch_size, self.config.seed
        step = self.start_step
        while True:
            # By place in the endless series: any split into ranks and windows draws the same, and
            # what is left at the end of an epoch comes before the next one.
            place = (step * self.world + self.rank) * size
            yield place_batch(self.cache, seed, range(place, place + size))
            step += 1


def group_of(captions: Sequence[str]) -> int:
    """Return a number of a list of captions: its pictures can't be told apart by text."""
    digest = hashlib.sha256(json.dumps(sorted(captions)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@lru_cache(maxsize=4)  # a batch lies in one epoch or two; sets that are mixed have their own
def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch's pictures, a permutation."""
    generator = torch.Generator().manual_seed(derived_seed("order", seed, epoch))
    return torch.randperm(count, generator=generator)


def place_batch(cache: Cache, seed: int, places: Sequence[int]) -> CachedBatch:
    """Return the samples at places of an endless series of shuffled epochs."""
    count = len(cache.pictures)
    indices = torch.stack(
        [epoch_order(count, seed, place // count)[place % count] for place in places]
    )
    return cache.batch(indices, [derived_seed("captions", seed, place) / 2**63 for place in places])


def cached_loader(
    cache: Cache, config: DataConfig, *, start_step: int = 0, rank: int = 0, world: int = 1
) -> DataLoader[CachedBatch]:
    """Return an endless loader; it starts with the batch of ``start_step``."""
    return DataLoader(
        _EndlessBatches(cache, config, start_step, rank, world),
        batch_size=None,
        pin_memory=torch.cuda.is_available(),
    )
