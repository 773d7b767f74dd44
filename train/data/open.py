"""A run's data, opened and checked: what the training loop takes its batches from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from cascade.config import to_dict
from cascade.errors import UserError
from train.data.activity import Activity
from train.data.buckets import Shape
from train.data.cached import CACHE_FILES, Cache, CachedBatch, cached_loader, load_cache
from train.data.config import DataConfig
from train.data.exact import ExactRows, ExactSource, IndexedSet, exact_plan, index_set
from train.data.fingerprint import CacheFound, check_fits, find_cache, samples_left_out
from train.data.loader import StepSource, StreamLoader
from train.data.mix import MixedRows, MixedSource, Mixture, mixed_loader, set_seed
from train.data.resampled import ResampledSource, probe_shards
from train.data.select import Selector
from train.data.sources import check_allowed, expand_shards, shard_title
from train.encode import EncodeBatch, FrozenEncoders, FrozenPaths

_log = logging.getLogger(__name__)

LoaderFrom = Callable[[int, int, int], Iterable[CachedBatch]]
"""Maps (step, rank, number of ranks) to the loader whose first batch is that step's."""

_POSITION_FREE = ("workers", "index_folder", "allow_pipe", "max_broken_share", "shards", "folder")
"""Options that do not change which samples a step sees, in exact mode and in memory."""


@dataclass(frozen=True)
class TrainingData:
    """Where a run's batches come from."""

    loader_from: LoaderFrom
    shapes: list[Shape]
    """Heights and widths of the pictures that are served."""
    null_text: tuple[Tensor, Tensor] | None
    """Hidden (L, D) and pooled (P,) states of the empty prompt, if the run reads text states."""
    widths: dict[str, int]
    """Part -> its last dimension, where it is known."""
    digest: str
    """Hash of all that the order of the samples depends on."""
    captions: tuple[str, ...] | None = None
    """All distinct captions in their order by letter, of what is in memory."""
    encode: EncodeBatch | None = None
    """What makes the parts that the stream does not hold."""
    hashes: dict[str, str] = field(default_factory=dict)
    """Part -> hash of the frozen weights that make it, in a cache or in every step."""
    lost: dict[str, int] = field(default_factory=dict)
    """Samples of the set that no step will see, by ``train.data.select.LOST_KINDS``; a resampled
    stream tells of them as it comes upon them."""
    batches_per_epoch: Callable[[int, int], int] | None = None
    """Batches that a rank takes an epoch, of a batch size and ranks; None: epochs have no end."""

    def taught_by(self, fingerprint: str) -> TrainingData:
        """Return the same data for a run that asks a teacher, whose weights it remembers."""
        return replace(self, hashes={**self.hashes, "lesson": fingerprint})


def open_data(
    config: DataConfig, frozen: FrozenPaths | None = None, *, pixels: bool = True
) -> TrainingData:
    """Open what a run trains on.

    Args:
        config: The run's ``data`` section.
        frozen: The networks whose output the run reads. From memory, and from shards of a cache,
            it comes from there; for a stream of pictures it is made in every step.
        pixels: Whether the run reads pixels, which shards of a cache do not hold.

    Raises:
        UserError: What is there can't be trained on.
    """
    frozen = frozen or FrozenPaths()
    if frozen.compressor_input is not None and config.mode == "memory":
        raise UserError(
            "compressor_input is drawn anew in every step, which cached latents can't follow; "
            "stream pictures: data.mode exact or resampled"
        )
    if config.mode == "memory":
        return _mixed_in_memory(config, frozen) if config.mix else _in_memory(config, frozen)
    hashes = frozen.hashes()
    streams = [_stream(one, frozen, hashes, pixels=pixels) for one in config.sets()]
    if len({stream.found is None for stream in streams}) > 1:
        raise UserError("data.mix: all of its sets hold pictures, or all hold latents of a cache")
    encoded = frozen if hashes and streams[0].found is None else None
    data = (
        _mixed_streams(config, streams, encoded) if config.mix else _streamed(streams[0], encoded)
    )
    return replace(data, hashes=hashes)


@dataclass(frozen=True)
class _Stream:
    """Shards that are streamed, looked at from outside."""

    config: DataConfig
    addresses: list[str]
    selector: Selector
    found: CacheFound | None
    """What they were made with, if they hold latents."""


def _stream(
    config: DataConfig, frozen: FrozenPaths, hashes: dict[str, str], *, pixels: bool
) -> _Stream:
    """Find shards and, if they are a cache's, see that it fits.

    Raises:
        UserError: It does not.
    """
    addresses = expand_shards(config.shards)
    check_allowed(addresses, allow_pipe=config.allow_pipe, in_pieces=config.mode == "exact")
    found = find_cache(addresses)
    if found is None:
        return _Stream(config, addresses, Selector.of(config), None)
    if pixels:
        raise UserError(
            f"{config.shards}: shards of latents, but this run reads pixels; name the shards "
            "of the pictures"
        )
    if frozen.compressor_input is not None:
        raise UserError(
            f"{config.shards}: shards of latents, but compressor_input is drawn anew in every "
            "step; name the shards of the pictures"
        )
    check_fits(found.fingerprint, config, hashes)
    if len(addresses) < found.num_shards:
        _log.warning(
            "%s: %d of the cache's %d shards; was precompute stopped? the same command goes on",
            config.shards,
            len(addresses),
            found.num_shards,
        )
    if left_out := samples_left_out(found, config.filters):
        _log.info(
            "%s: the cache was made with stronger filters than data.filters (%s): samples that "
            "they left out are not there",
            config.shards,
            left_out,
        )
    parts = tuple(name for part in hashes for name in CACHE_FILES[part])
    return _Stream(config, addresses, Selector.of(config, parts), found)


def _in_memory(config: DataConfig, frozen: FrozenPaths) -> TrainingData:
    hashes = frozen.hashes()
    cache = load_cache(config, hashes)
    height, width = cache.pictures.pixels.shape[-2:]

    def loader(step: int, rank: int, world: int) -> Iterable[CachedBatch]:
        return cached_loader(cache, config, start_step=step, rank=rank, world=world)

    return TrainingData(
        loader_from=loader,
        shapes=[(height, width)],
        null_text=cache.null_text,
        widths={name: tensor.shape[-1] for name, tensor in cache.tensors.items()},
        digest=_digest(config, cache.pictures.fingerprint()),
        captions=_captions([cache]),
        hashes=hashes,
        lost={"broken": cache.pictures.num_broken},
    )


def _mixed_in_memory(config: DataConfig, frozen: FrozenPaths) -> TrainingData:
    hashes = frozen.hashes()
    caches = [load_cache(one, hashes) for one in config.sets()]
    shapes = [cache.pictures.pixels.shape[-2:] for cache in caches]
    sizes = sorted({(height, width) for height, width in shapes})
    if len(sizes) > 1:
        raise UserError(f"data.mix: pictures of {len(sizes)} sizes ({sizes}); one is needed")
    _say_shares(config, [len(cache.pictures) for cache in caches])

    def loader(step: int, rank: int, world: int) -> Iterable[CachedBatch]:
        return mixed_loader(caches, config, start_step=step, rank=rank, world=world)

    return TrainingData(
        loader_from=loader,
        shapes=sizes,
        null_text=caches[0].null_text,
        widths={name: tensor.shape[-1] for name, tensor in caches[0].tensors.items()},
        digest=_digest(config, json.dumps([cache.pictures.fingerprint() for cache in caches])),
        captions=_captions(caches),
        hashes=hashes,
        lost={"broken": sum(cache.pictures.num_broken for cache in caches)},
    )


def _captions(caches: list[Cache]) -> tuple[str, ...]:
    lists = [captions for cache in caches for captions in cache.pictures.captions]
    return tuple(sorted({caption for captions in lists for caption in captions}))


def _say_shares(config: DataConfig, counts: list[int]) -> None:
    mixture = Mixture.of(config)
    for name, share, count in zip(mixture.names, mixture.shares, counts, strict=True):
        _log.info("set %s: %.1f %% of the rows, from %d samples", name, 100 * share, count)


def _mixed_streams(
    config: DataConfig, streams: list[_Stream], encoded: FrozenPaths | None
) -> TrainingData:
    if config.mode == "exact":
        return _mixed_exact(config, streams, encoded)
    activity, mixture = Activity(config.workers), Mixture.of(config)
    probes = [probe_shards(one.addresses, one.config, one.selector) for one in streams]
    weights = mixture.shares.tolist()
    shares = tuple(
        float(np.dot(weights, of_shape))
        for of_shape in zip(*(probe.shares for probe in probes), strict=True)
    )
    for name, stream, probe in zip(mixture.names, streams, probes, strict=True):
        _log.info(
            "set %s: %.1f %% of the rows, from %d shards; of two: %s",
            name,
            100 * weights[mixture.names.index(name)],
            len(stream.addresses),
            probe.report.summary(),
        )
        lacking = [n for n, share in enumerate(shares) if share and not probe.shares[n]]
        if stream.found is not None and lacking:
            shape = stream.selector.buckets.name(lacking[0])
            raise UserError(
                f"data.mix: {name} has no latents of {shape}, but another set has; cache all sets "
                "in the same shapes, or stream the pictures, which can be cropped"
            )

    def make(rank: int, world: int) -> StepSource:
        sources = []
        for number, (stream, probe) in enumerate(zip(streams, probes, strict=True)):
            rows = MixedRows(config.batch_size, shares, config.seed, mixture, number, rank, world)
            own = replace(stream.config, seed=set_seed(config, number))
            sources.append(
                ResampledSource(
                    stream.addresses,
                    own,
                    stream.selector,
                    probe,
                    activity,
                    rank=rank,
                    world=world,
                    rows=rows,
                )
            )
        return MixedSource(sources, mixture, rank=rank, world=world)

    state = [
        [[shard_title(address) for address in stream.addresses], probe.kept_per_shard, probe.shares]
        for stream, probe in zip(streams, probes, strict=True)
    ]
    text = json.dumps([state, config.workers])
    return _served(streams[0], config, make, activity, text, encoded)


def _mixed_exact(
    config: DataConfig, streams: list[_Stream], encoded: FrozenPaths | None
) -> TrainingData:
    activity, mixture = Activity(config.workers), Mixture.of(config)
    found = [_indexed(stream) for stream in streams]
    _say_shares(config, [one.report.taken for one in found])

    def make(rank: int, world: int) -> StepSource:
        sources = []
        for number, (stream, indexed) in enumerate(zip(streams, found, strict=True)):
            rows = MixedRows(config.batch_size, (1.0,), config.seed, mixture, number, rank, world)
            own = replace(stream.config, seed=set_seed(config, number))
            sources.append(ExactRows(own, stream.selector, indexed, activity, rows))
        return MixedSource(sources, mixture, rank=rank, world=world)

    state = json.dumps([one.digest() for one in found])
    lost: Counter[str] = Counter()
    for one in found:
        lost.update(one.report.lost())
    return replace(_served(streams[0], config, make, activity, state, encoded), lost=dict(lost))


def _indexed(stream: _Stream) -> IndexedSet:
    """Look through a set of exact mode.

    Raises:
        UserError: There is too little of it.
    """
    config = stream.config
    found = index_set(stream.addresses, stream.selector, config.index_folder, config.shards)
    found.report.require_mostly_whole(config.max_broken_share, config.shards)
    _log.info("%s", found.report.summary())
    return found


def _streamed(stream: _Stream, encoded: FrozenPaths | None) -> TrainingData:
    config, addresses, selector = stream.config, stream.addresses, stream.selector
    activity = Activity(config.workers)
    make: Callable[[int, int], StepSource]
    lost: dict[str, int] = {}
    batches: Callable[[int, int], int] | None = None
    if config.mode == "exact":
        indexed = _indexed(stream)
        state, lost = indexed.digest(), indexed.report.lost()

        def make(rank: int, world: int) -> StepSource:
            source = ExactSource(config, selector, indexed, activity, rank=rank, world=world)
            if rank == 0:
                _log.info("%s", source.plan.describe())
            return source

        def batches(batch_size: int, world: int) -> int:
            other = replace(config, batch_size=batch_size)
            return exact_plan(other, selector, indexed, world).steps_per_epoch

    else:
        probe = probe_shards(addresses, config, selector)
        _log.info("%d shards; of two: %s", len(addresses), probe.report.summary())
        titles = [shard_title(address) for address in addresses]
        state = json.dumps([titles, probe.kept_per_shard, probe.shares, config.workers])

        def make(rank: int, world: int) -> StepSource:
            return ResampledSource(
                addresses, config, selector, probe, activity, rank=rank, world=world
            )

    data = _served(stream, config, make, activity, state, encoded)
    return replace(data, lost=lost, batches_per_epoch=batches)


def _served(
    stream: _Stream,
    config: DataConfig,
    make: Callable[[int, int], StepSource],
    activity: Activity,
    state: str,
    encoded: FrozenPaths | None,
) -> TrainingData:
    """Return the data that sources serve; of several sets ``stream`` is the first."""

    def loader(step: int, rank: int, world: int) -> Iterable[CachedBatch]:
        return StreamLoader(
            make(rank, world),
            activity,
            start_step=step,
            workers=config.workers,
            max_broken_share=config.max_broken_share,
        )

    null_text, widths, found = None, {}, stream.found
    if found is not None:
        null_text, widths = found.null_text, found.fingerprint.widths
    elif encoded is not None:
        _log.info("no cache: the frozen networks run in every step")
        # Only the text encoders are loaded here, for the empty prompt; the run loads all of them.
        null_text = FrozenEncoders(encoded.only("text")).null_text()
    return TrainingData(
        loader_from=loader,
        shapes=list(stream.selector.buckets.shapes),
        null_text=null_text,
        widths=widths,
        digest=_digest(config, state),
        encode=EncodeBatch(encoded, config.seed) if encoded is not None else None,
    )


def _digest(config: DataConfig, state: str) -> str:
    values = {name: v for name, v in to_dict(config).items() if name not in _POSITION_FREE}
    if not config.mix:
        del values["mix"]  # as before there were mixtures: runs of then go on without a warning
    text = json.dumps([values, state], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
