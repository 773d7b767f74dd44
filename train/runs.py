"""What each subcommand of ``python -m train`` does: load data, build the system, fit."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from cascade.checkpoints.files import file_hash, load_network
from cascade.errors import UserError
from cascade.text.tokenizer import train_tokenizer
from train.data.cached import Cache, cached_loader, load_cache
from train.data.config import DataConfig
from train.data.precompute import text_hash
from train.fit import LoaderFrom, fit, prepare
from train.systems.clip import ClipRun, ClipSystem, load_clip, load_tokenizer
from train.systems.compressor import CompressorRun, CompressorSystem
from train.systems.previewer import PreviewerRun, PreviewerSystem
from train.systems.stage_a import StageARun, StageASystem
from train.systems.stage_b import StageBRun, StageBSystem
from train.systems.stage_c import StageCRun, StageCSystem


def train_clip(config: ClipRun, *, resume: bool) -> None:
    """Train the tokenizer on the captions, then the two towers."""
    out = prepare(config.run, config, resume=resume)
    cache = load_cache(config.data, {})
    system = ClipSystem(config, _tokenizer(config, cache, out, resume=resume))
    if config.init_from is not None:
        _copy(load_clip(config.init_from), system.network, config.init_from)
    fit(system, _loader(cache, config.data), config.run, config.optim, resume=resume)


def train_stage_a(config: StageARun, *, resume: bool) -> None:
    """Train the autoencoder."""
    prepare(config.run, config, resume=resume)
    cache = load_cache(config.data, {})
    height, width = cache.pictures.pixels.shape[-2:]
    if config.crop > min(height, width):
        raise UserError(f"crop is {config.crop} but the pictures are {width}x{height}")
    if config.crop % config.model.downscale:
        raise UserError(
            f"crop is {config.crop}; Stage A needs a multiple of {config.model.downscale}"
        )
    system = StageASystem(config)
    _start_from(system.network, config.init_from)
    fit(system, _loader(cache, config.data), config.run, config.optim, resume=resume)


def train_compressor(config: CompressorRun, *, resume: bool) -> None:
    """Train the compressor with the previewer as its decoder."""
    prepare(config.run, config, resume=resume)
    cache = load_cache(config.data, {})
    system = CompressorSystem(config)
    _start_from(system.compressor, config.init_from)
    fit(system, _loader(cache, config.data), config.run, config.optim, resume=resume)


def train_stage_b(config: StageBRun, *, resume: bool) -> None:
    """Train Stage B on cached Stage A latents and text, with the compressor or on its latents."""
    prepare(config.run, config, resume=resume)
    expect = {
        "text": text_hash(config.text, config.text_states),
        "stage_a": file_hash(Path(config.stage_a)),
    }
    if config.frozen_compressor is not None:
        expect["stage_c"] = file_hash(Path(config.frozen_compressor))
    cache = load_cache(config.data, expect)
    assert cache.null_text is not None, "load_cache gives the null text with the text part"
    _fits("model.text_pooled_channels", config.model.text_pooled_channels, cache.null_text[1])
    system = StageBSystem(config, cache.null_text)
    if config.init_from is not None:
        _start_from(system.network, f"{config.init_from}/stage_b.safetensors")
        if system.compressor is not None:
            _start_from(system.compressor, f"{config.init_from}/compressor.safetensors")
    fit(system, _loader(cache, config.data), config.run, config.optim, resume=resume)


def train_stage_c(config: StageCRun, *, resume: bool) -> None:
    """Train Stage C on cached compressor latents and text states."""
    prepare(config.run, config, resume=resume)
    expect = {
        "text": text_hash(config.text, config.text_states),
        "stage_c": file_hash(Path(config.compressor)),
    }
    if config.image_share > 0:
        expect["image"] = text_hash(config.text)
    cache = load_cache(config.data, expect)
    assert cache.null_text is not None, "load_cache gives the null text with the text part"
    if config.image_share > 0 and config.model.image_channels is not None:
        embeds = cache.tensors["image_embeds"]
        _fits("model.image_channels", config.model.image_channels, embeds, "image embeddings")
    _fits("model.text_channels", config.model.text_channels, cache.null_text[0])
    _fits("model.text_pooled_channels", config.model.text_pooled_channels, cache.null_text[1])
    system = StageCSystem(config, cache.null_text)
    _start_from(system.network, config.init_from)
    fit(system, _loader(cache, config.data), config.run, config.optim, resume=resume)


def train_previewer(config: PreviewerRun, *, resume: bool) -> None:
    """Train the previewer on cached compressor latents."""
    prepare(config.run, config, resume=resume)
    cache = load_cache(config.data, {"stage_c": file_hash(Path(config.compressor))})
    system = PreviewerSystem(config)
    _start_from(system.network, config.init_from)
    fit(system, _loader(cache, config.data), config.run, config.optim, resume=resume)


def _loader(cache: Cache, config: DataConfig) -> LoaderFrom:
    return lambda step, rank, world: cached_loader(
        cache, config, start_step=step, rank=rank, world=world
    )


def _tokenizer(
    config: ClipRun, cache: Cache, out: Path, *, resume: bool
) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the run that goes on, of the CLIP it starts from, or a new one."""
    if resume:
        return load_tokenizer(out / "text")
    if config.init_from is not None:
        return load_tokenizer(config.init_from)
    captions = sorted({c for captions in cache.pictures.captions for c in captions})
    return train_tokenizer(captions, config.model.vocab_size, config.model.max_tokens)


def _fits(key: str, wanted: int, state: Tensor, what: str = "text states") -> None:
    """Check a width of the network against the cache's."""
    if state.shape[-1] != wanted:
        raise UserError(f"{key} is {wanted} but the cached {what} have {state.shape[-1]}")


def _start_from(network: nn.Module, path: str | None) -> None:
    """Copy exported weights into a fresh network of the same configuration."""
    if path is not None:
        _copy(load_network(path, expect=type(network)), network, path)


def _copy(start: nn.Module, network: nn.Module, path: str) -> None:
    try:
        network.load_state_dict(start.state_dict())
    except RuntimeError as error:
        raise UserError(f"init_from {path}: does not fit the configured model: {error}") from error
