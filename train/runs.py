"""What each subcommand of ``python -m train`` does: load data, build the system, fit."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerFast

from cascade.checkpoints.files import file_hash, load_network
from cascade.text.tokenizer import train_tokenizer
from train.data.cached import Cache, CacheConfig, cached_loader, load_cache
from train.data.precompute import text_hash
from train.fit import LoaderFrom, fit, prepare
from train.systems.clip import ClipRun, ClipSystem
from train.systems.previewer import PreviewerRun, PreviewerSystem
from train.systems.stage_a import StageARun, StageASystem
from train.systems.stage_b import StageBRun, StageBSystem
from train.systems.stage_c import StageCRun, StageCSystem


def train_clip(config: ClipRun, *, resume: bool) -> None:
    """Train the tokenizer on the captions, then the two towers."""
    out = prepare(config.run, config)
    cache = load_cache(config.data, {})
    folder = Path(config.init_from) if config.init_from else out / "text"
    if (folder / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    else:
        captions = sorted({c for captions in cache.pictures.captions for c in captions})
        tokenizer = train_tokenizer(captions, config.model.vocab_size, config.model.max_tokens)
    system = ClipSystem(config, tokenizer)
    if config.init_from is not None:
        from transformers import CLIPModel

        start = CLIPModel.from_pretrained(config.init_from, local_files_only=True)
        system.network.load_state_dict(start.state_dict())
    fit(system, _loader(cache, config.data), config.run, config.optim, resume=resume)


def train_stage_a(config: StageARun, *, resume: bool) -> None:
    """Train the autoencoder."""
    prepare(config.run, config)
    cache = load_cache(config.data, {})
    system = StageASystem(config)
    _start_from(system.network, config.init_from)
    fit(system, _loader(cache, config.data), config.run, config.optim, resume=resume)


def train_stage_b(config: StageBRun, *, resume: bool) -> None:
    """Train Stage B with the semantic compressor on cached Stage A latents and text."""
    prepare(config.run, config)
    expect = {"text": text_hash(config.text), "stage_a": file_hash(Path(config.stage_a))}
    cache = load_cache(config.data, expect)
    assert cache.null_text is not None, "load_cache gives the null text with the text part"
    system = StageBSystem(config, cache.null_text)
    if config.init_from is not None:
        _start_from(system.network, f"{config.init_from}/stage_b.safetensors")
        _start_from(system.compressor, f"{config.init_from}/compressor.safetensors")
    fit(system, _loader(cache, config.data), config.run, config.optim, resume=resume)


def train_stage_c(config: StageCRun, *, resume: bool) -> None:
    """Train Stage C on cached compressor latents and text states."""
    prepare(config.run, config)
    expect = {"text": text_hash(config.text), "stage_c": file_hash(Path(config.compressor))}
    cache = load_cache(config.data, expect)
    assert cache.null_text is not None, "load_cache gives the null text with the text part"
    system = StageCSystem(config, cache.null_text)
    _start_from(system.network, config.init_from)
    fit(system, _loader(cache, config.data), config.run, config.optim, resume=resume)


def train_previewer(config: PreviewerRun, *, resume: bool) -> None:
    """Train the previewer on cached compressor latents."""
    prepare(config.run, config)
    cache = load_cache(config.data, {"stage_c": file_hash(Path(config.compressor))})
    system = PreviewerSystem(config)
    _start_from(system.network, config.init_from)
    fit(system, _loader(cache, config.data), config.run, config.optim, resume=resume)


def _loader(cache: Cache, config: CacheConfig) -> LoaderFrom:
    return lambda step: cached_loader(cache, config, start_step=step)


def _start_from(network: nn.Module, path: str | None) -> None:
    """Copy exported weights into a fresh network of the same configuration."""
    if path is not None:
        network.load_state_dict(load_network(path, expect=type(network)).state_dict())
