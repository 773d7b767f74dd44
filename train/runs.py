"""What each subcommand of ``python -m train`` does: load data, build the system, fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import lightning.pytorch as pl
from torch import nn
from transformers import PreTrainedTokenizerFast

from cascade.checkpoints.part_files import find_network
from cascade.errors import UserError
from cascade.text.tokenizer import train_tokenizer
from stages.autoencoder_kl import AutoencoderKLConfig
from stages.semantic_compressor import CompressorConfig
from stages.stage_b_v2 import StageBV2Config
from stages.stage_c import StageCConfig
from stages.stage_c_v2 import StageCV2Config
from train.callbacks.drawing import CascadeDrawing, Drawing, UNetDrawing
from train.callbacks.pictures import SamplePictures
from train.callbacks.posthoc_ema import PosthocEma
from train.callbacks.validation import Validation
from train.data.open import TrainingData, open_data
from train.data.remembered import remember_data
from train.encode import FrozenPaths
from train.fit import Prepared, fit, prepare
from train.initial import start, start_compressor_from, start_from, with_architecture
from train.systems.adversarial import AutoencoderRun
from train.systems.autoencoder_kl import AutoencoderKLRun, AutoencoderKLSystem
from train.systems.clip import ClipRun, ClipSystem, load_clip, load_tokenizer
from train.systems.compressor import CompressorRun, CompressorSystem
from train.systems.previewer import PreviewerRun, PreviewerSystem
from train.systems.stage_a import StageARun, StageASystem
from train.systems.stage_a_decoder import StageADecoderRun
from train.systems.stage_b import StageBRun, StageBSystem
from train.systems.stage_c import StageCRun, StageCSystem
from train.systems.step_distil_config import StepDistilRun
from train.systems.unet import UNetRun

AnyRun = (
    ClipRun
    | StageARun
    | AutoencoderKLRun
    | CompressorRun
    | StageBRun
    | StageCRun
    | PreviewerRun
    | StageADecoderRun
    | StepDistilRun
    | UNetRun
)


def train_clip(config: ClipRun, *, resume: bool) -> None:
    """Train the tokenizer on the captions, then the two towers."""
    prepared = prepare(config.run, config, resume=resume)
    data = open_data(config.data)
    system = ClipSystem(config, _tokenizer(config, data.captions, prepared))
    if config.init_from is not None and prepared.newest is None:
        _copy(load_clip(config.init_from), system.network, config.init_from)
    fit_system(system, data, config, prepared)


def train_stage_a(config: StageARun, *, resume: bool) -> None:
    """Train the autoencoder."""
    config = with_architecture(config, "stage_a", resume=resume)
    prepared = prepare(config.run, config, resume=resume)
    data = open_data(config.data)
    check_crop(config, data, "Stage A", config.sizes.downscale)
    system = StageASystem(config)
    start(system.network, config.init_from, "stage_a", prepared)
    fit_system(system, data, config, prepared)


def train_autoencoder_kl(config: AutoencoderKLRun, *, resume: bool) -> None:
    """Train a U-Net's autoencoder."""
    config = with_architecture(config, "autoencoder_kl", resume=resume)
    prepared = prepare(config.run, config, resume=resume)
    data = open_data(config.data)
    check_crop(config, data, "this autoencoder", config.sizes.downscale)
    if config.init_from is not None and prepared.newest is None:
        _check_scale(config, find_network(config.init_from, "autoencoder_kl").published.config)
    system = AutoencoderKLSystem(config)
    start(system.network, config.init_from, "autoencoder_kl", prepared)
    fit_system(system, data, config, prepared)


def train_compressor(config: CompressorRun, *, resume: bool) -> None:
    """Train the compressor with the previewer as its decoder."""
    config = with_architecture(config, "compressor", resume=resume)
    prepared = prepare(config.run, config, resume=resume)
    data = open_data(config.data)
    system = CompressorSystem(config)
    start(system.compressor, config.init_from, "compressor", prepared)
    fit_system(system, data, config, prepared)


def train_stage_b(config: StageBRun, *, resume: bool) -> None:
    """Train Stage B on Stage A latents and text, with the compressor or on its latents."""
    config = with_architecture(config, "stage_b", resume=resume)
    prepared = prepare(config.run, config, resume=resume)
    frozen = frozen_of_stage_b(config)
    data = open_stage_b(config, frozen)
    assert data.null_text is not None, "open_data gives the null text with the text part"
    system = StageBSystem(config, data.null_text, finished_compressor(config))
    section = "model_v2" if isinstance(config.sizes, StageBV2Config) else "model"
    start(system.network, config.init_from, "stage_b", prepared, section, config.diffusion)
    if system.compressor is not None and prepared.newest is None:
        folder = None if config.init_from is None else Path(config.init_from)
        if config.compressor_init_from is not None:
            start_compressor_from(system.compressor, config.compressor_init_from)
        elif folder is not None and (folder / "compressor.safetensors").is_file():
            start_from(system.compressor, str(folder), "compressor", "compressor")
        elif folder is not None:
            raise UserError(
                f"init_from {folder}: no compressor.safetensors in it, and the compressor learns "
                "too; name its weights as compressor_init_from"
            )
    fit_stage_b(system, data, config, frozen, prepared)


def frozen_of_stage_b(config: StageBRun) -> FrozenPaths:
    """Return the networks whose output Stage B learns from."""
    sizes = config.sizes
    return FrozenPaths(
        text=config.text,
        text_states=config.text_states,
        text_width=sizes.text_channels if isinstance(sizes, StageBV2Config) else None,
        stage_a=config.stage_a,
        stage_a_scale=config.stage_a_scale,
        compressor=config.frozen_compressor,
        compressor_input=config.compressor_input,
    )


def open_stage_b(config: StageBRun, frozen: FrozenPaths) -> TrainingData:
    """Open the data of a Stage B and check that they fit the network."""
    sizes = config.sizes
    data = open_data(config.data, frozen, pixels=config.compressor is not None)
    assert data.null_text is not None, "open_data gives the null text with the text part"
    if isinstance(sizes, StageBV2Config):
        check_width("model_v2.text_channels", sizes.text_channels, data.null_text[0].shape[-1])
        _check_shapes(sizes, config, data)
    else:
        pooled_channels = data.null_text[1].shape[-1]
        check_width("model.text_pooled_channels", sizes.text_pooled_channels, pooled_channels)
    return data


def finished_compressor(config: StageBRun) -> CompressorConfig | None:
    """Return the sizes of a finished compressor; None: it is trained."""
    if config.frozen_compressor is None:
        return None
    found = find_network(config.frozen_compressor, "compressor").published.config
    return cast(CompressorConfig, found)


def fit_stage_b(
    system: StageBSystem,
    data: TrainingData,
    config: StageBRun,
    frozen: FrozenPaths,
    prepared: Prepared,
    *,
    first: Sequence[pl.Callback] = (),
) -> None:
    """Train a Stage B that has its first weights.

    Args:
        system: With the network.
        data: What it is trained on.
        config: The run.
        frozen: The networks whose output held-out pictures are judged on.
        prepared: The run's folder.
        first: Callbacks that act before all others.
    """
    last = validation(config, frozen, prepared, pixels=config.compressor is not None)
    fit_system(system, data, config, prepared, last, first=first)


def train_stage_c(config: StageCRun, *, resume: bool) -> None:
    """Train Stage C on compressor latents and text states."""
    config = with_architecture(config, "stage_c", resume=resume)
    prepared = prepare(config.run, config, resume=resume)
    frozen = frozen_of_stage_c(config)
    data = open_stage_c(config, frozen)
    assert data.null_text is not None, "open_data gives the null text with the text part"
    fit_stage_c(StageCSystem(config, data.null_text), data, config, frozen, prepared)


def frozen_of_stage_c(config: StageCRun) -> FrozenPaths:
    """Return the networks whose output Stage C learns from."""
    return FrozenPaths(
        text=config.text,
        text_states=config.text_states,
        text_width=config.sizes.text_channels,
        compressor=config.compressor,
        image=(config.image or config.text) if config.image_share > 0 else None,
    )


def open_stage_c(config: StageCRun, frozen: FrozenPaths) -> TrainingData:
    """Open the data of a Stage C and check that its widths are the network's."""
    sizes = config.sizes
    data = open_data(config.data, frozen, pixels=False)
    assert data.null_text is not None, "open_data gives the null text with the text part"
    section = "model_v2" if isinstance(sizes, StageCV2Config) else "model"
    check_width(f"{section}.text_channels", sizes.text_channels, data.null_text[0].shape[-1])
    if isinstance(sizes, StageCConfig):
        if config.image_share > 0 and sizes.image_channels is not None:
            width = data.widths.get("image_embeds", sizes.image_channels)
            check_width("model.image_channels", sizes.image_channels, width, "image embeddings")
        pooled_channels = data.null_text[1].shape[-1]
        check_width("model.text_pooled_channels", sizes.text_pooled_channels, pooled_channels)
    return data


def fit_stage_c(
    system: StageCSystem,
    data: TrainingData,
    config: StageCRun,
    frozen: FrozenPaths,
    prepared: Prepared,
    *,
    first: Sequence[pl.Callback] = (),
) -> None:
    """Start the network as ``init_from`` says, and train it.

    Args:
        system: With the network.
        data: What it is trained on.
        config: The run.
        frozen: The networks whose output held-out pictures are judged on.
        prepared: The run's folder.
        first: Callbacks that act before all others.
    """
    section = "model_v2" if isinstance(config.sizes, StageCV2Config) else "model"
    start(system.network, config.init_from, "stage_c", prepared, section, config.diffusion)
    # Held-out pictures are judged by their captions alone.
    judged = replace(frozen, image=None)
    last = validation(config, judged, prepared, pixels=False)
    fit_system(system, data, config, prepared, last, first=first)


def train_previewer(config: PreviewerRun, *, resume: bool) -> None:
    """Train the previewer on compressor latents."""
    config = with_architecture(config, "previewer", resume=resume)
    prepared = prepare(config.run, config, resume=resume)
    data = open_data(config.data, FrozenPaths(compressor=config.compressor))
    system = PreviewerSystem(config)
    start(system.network, config.init_from, "previewer", prepared)
    fit_system(system, data, config, prepared)


def validation(
    config: StageBRun | StageCRun | UNetRun,
    frozen: FrozenPaths,
    prepared: Prepared,
    *,
    pixels: bool,
) -> list[pl.Callback]:
    """Return what judges the run on held-out pictures, if it asks for that."""
    if config.validation is None:
        return []
    held_out = open_data(config.validation.data(config.data), frozen, pixels=pixels)
    return [Validation(config.validation, held_out, prepared.out, pixels=pixels)]


def fit_system(
    system: pl.LightningModule,
    data: TrainingData,
    config: AnyRun,
    prepared: Prepared,
    last: Sequence[pl.Callback] = (),
    *,
    first: Sequence[pl.Callback] = (),
) -> None:
    """Train on the data, with the frozen networks that they need.

    Args:
        system: What is trained.
        data: What it is trained on.
        config: The run.
        prepared: Its folder.
        last: Callbacks that act after those that all runs have.
        first: Callbacks that act before them.
    """
    remember_data(data, prepared.out, resume=prepared.newest is not None)
    callbacks = [*first, *([data.encode] if data.encode is not None else [])]
    last = list(last)
    if isinstance(config, (StageBRun, StageCRun, UNetRun)):
        if config.posthoc_ema is not None:
            last.append(PosthocEma(config.posthoc_ema, prepared.out))
    if isinstance(config, (StageBRun, StageCRun, StepDistilRun, UNetRun)):
        if config.pictures is not None:
            last.append(SamplePictures(config.pictures, prepared.out, _drawing(config)))
    fit(
        system,
        data.loader_from,
        config.run,
        config.optim,
        prepared,
        batch_size=config.data.batch_size,
        lost=data.lost,
        batches_per_epoch=data.batches_per_epoch,
        callbacks=callbacks,
        last=last,
    )


def _drawing(config: StageBRun | StageCRun | StepDistilRun | UNetRun) -> Drawing:
    """Return what draws pictures with the network that learns."""
    assert config.pictures is not None
    if isinstance(config, UNetRun):
        return UNetDrawing(config.pictures.model, config.diffusion)
    if isinstance(config, StepDistilRun):
        return CascadeDrawing(config.pictures.model, config.stage, config)
    stage: Literal["stage_b", "stage_c"] = "stage_c" if isinstance(config, StageCRun) else "stage_b"
    return CascadeDrawing(config.pictures.model, stage, config.diffusion)


def _tokenizer(
    config: ClipRun, captions: Sequence[str] | None, prepared: Prepared
) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the run that goes on, of the CLIP it starts from, or a new one."""
    if prepared.newest is not None:
        return load_tokenizer(prepared.out / "text")
    if config.init_from is not None:
        return load_tokenizer(config.init_from)
    if captions is None:
        raise UserError(
            f"data.mode is {config.data.mode}: a tokenizer is trained on captions in memory; name "
            "an init_from, or use data.mode memory"
        )
    return train_tokenizer(captions, config.model.vocab_size, config.model.max_tokens)


def check_width(key: str, wanted: int, found: int, what: str = "text states") -> None:
    """Check a width of the network against the cache's."""
    if found != wanted:
        raise UserError(f"{key} is {wanted} but the cached {what} have {found}")


def check_crop(
    config: AutoencoderRun | StageADecoderRun, data: TrainingData, network: str, downscale: int
) -> None:
    """Refuse crops that do not fit into the pictures, or that the autoencoder can't halve."""
    for height, width in data.shapes:
        if config.crop > min(height, width):
            raise UserError(f"crop is {config.crop} but the pictures are {width}x{height}")
    if config.crop % downscale:
        raise UserError(f"crop is {config.crop}; {network} needs a multiple of {downscale}")


def _check_scale(config: AutoencoderKLRun, start: AutoencoderKLConfig) -> None:
    """Refuse to keep a scale of the latents that the initial weights do not have."""
    for name in ("scale", "shift"):
        theirs, ours = getattr(start, name), getattr(config.sizes, name)
        if theirs != ours and not (name == "scale" and config.measures_scale):
            raise UserError(
                f"model.{name} is {ours} but {config.init_from} was trained with {theirs}; set "
                f"that, or leave model out to take it"
            )


def _check_shapes(sizes: StageBV2Config, config: StageBRun, data: TrainingData) -> None:
    """Refuse pictures whose Stage A latents Stage B of v2 can't halve as often as it does."""
    stage_a = find_network(config.stage_a, "stage_a").published.config
    multiple = sizes.latent_multiple * stage_a.downscale
    for height, width in data.shapes:
        if height % multiple or width % multiple:
            raise UserError(
                f"the pictures are {width}x{height}; this Stage B needs multiples of {multiple} px"
            )


def _copy(start: nn.Module, network: nn.Module, path: str) -> None:
    try:
        network.load_state_dict(start.state_dict())
    except RuntimeError as error:
        raise UserError(f"init_from {path}: does not fit the configured model: {error}") from error
