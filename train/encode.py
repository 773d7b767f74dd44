"""Frozen networks whose output another network is trained on: names, hashes, and their use.

A cache holds what they said once; a stream of pictures has them say it in every step.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from cascade.checkpoints.files import CLASS_KEY
from cascade.checkpoints.found import FoundNetwork
from cascade.checkpoints.load import build
from cascade.checkpoints.part_files import (
    find_image_encoder,
    find_network,
    find_text,
    weights_hash,
)
from cascade.errors import HoldsNone, UserError
from cascade.text.encoder import TextConfig, TextEncoder
from cascade.text.picture_encoder import PictureEncoder, centre_square
from stages.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from stages.semantic_compressor import SemanticCompressor
from stages.stage_a import StageA
from train.data.cached import CachedBatch
from train.distill.feature_target import FeatureSource, FeatureTarget
from train.draws import step_draws


def text_hash(name: str | Path, config: TextConfig | None = None, width: int | None = None) -> str:
    """Return what names text states: the hash of the encoder's weights, and how it was read."""
    weights, config = weights_hash(find_text(name, width).folder), config or TextConfig()
    if config == TextConfig():
        return weights
    padding = "" if config.masks_padding else "/sees padding"
    windows = "" if config.overflow == "warn" else f"/{config.overflow}"
    return f"{weights}/{config.hidden}/{config.pad_to}{padding}{windows}"


@dataclass(frozen=True)
class FrozenPaths:
    """The networks that a run reads the output of; None: it does not.

    Each is a file, a folder or a model, here or on the hub, in any layout that the pipeline loads.
    """

    text: str | None = None
    """Text encoder."""
    text_states: TextConfig | None = None
    """How it is read; None: as by default."""
    text_width: int | None = None
    """Channels of its states, where a model has two encoders."""
    text_2: str | None = None
    """SDXL's second text encoder: its hidden states stand beside the first one's, and its pooled
    state is the only one that is read. It is read as the first is."""
    text_2_width: int | None = None
    """Channels of its states, or of its pooled one."""
    stage_a: str | None = None
    """Stage A."""
    stage_a_scale: float | None = None
    """What its latents are divided by, where its file does not say it."""
    compressor: str | None = None
    """Semantic compressor; or a KL autoencoder, such as SDXL's, whose latents (the mean) a Stage C
    learns in its place."""
    compressor_input: tuple[float, float] | None = None
    """Range of the fraction of a picture's size that it sees, drawn once a step; None: its own."""
    image: str | None = None
    """CLIP's picture tower, for embeddings of the pictures."""
    autoencoder: str | None = None
    """The autoencoder of a U-Net."""
    features: FeatureTarget | None = None
    """Which features of a U-Net that a cascade is to imitate."""

    def hashes(self) -> dict[str, str]:
        """Return part, a key of ``CACHE_FILES`` -> hash of what makes it.

        Raises:
            UserError: A file is missing.
        """
        found = {}
        if self.text is not None:
            found["text"] = text_hash(self.text, self.text_states, self.text_width)
            if self.text_2 is not None:
                second = text_hash(self.text_2, self.text_states, self.text_2_width)
                found["text"] += f"+{second}"
        if self.stage_a is not None:
            found["stage_a"] = stage_a_hash(self.stage_a, self.stage_a_scale)
        if self.compressor is not None:
            compressor = find_compressor(self.compressor)
            found["stage_c"] = weights_hash(compressor.path)
            sizes = compressor.published.config
            if isinstance(sizes, AutoencoderKLConfig):
                found["stage_c"] += f"/mean/{sizes.scale}/{sizes.shift}"
        if self.image is not None:
            found["image"] = weights_hash(find_image_encoder(self.image))
        if self.autoencoder is not None:
            autoencoder = find_network(self.autoencoder, "autoencoder_kl")
            config = autoencoder.published.config
            scaled = f"/{config.scale}/{config.shift}"
            found["autoencoder"] = weights_hash(autoencoder.path) + scaled
        if self.features is not None:
            found["teacher"] = FeatureSource(self.features).fingerprint()
        return found

    def only(self, part: str) -> FrozenPaths:
        """Return what makes one part, a key of ``CACHE_FILES``."""
        others = {
            field: None for other, fields in MADE_BY.items() if other != part for field in fields
        }
        return replace(self, **others)


MADE_BY = {  # part -> fields of FrozenPaths
    "text": ("text", "text_2"),
    "stage_a": ("stage_a",),
    "stage_c": ("compressor",),
    "image": ("image",),
    "autoencoder": ("autoencoder",),
    "teacher": ("features",),
}
NO_NETWORK = (
    "precompute: name a network: --text, --image, --stage-a, --compressor, --autoencoder or "
    "--teacher-of"
)


def find_stage_a(name: str, scale: float | None) -> FoundNetwork:
    """Find Stage A with the scale of its latents.

    Files that were written here say it. The authors' do not, and diffusers' folder of Stable
    Cascade says Würstchen's by mistake, so theirs is asked for.

    Raises:
        UserError: Nothing is there, or the scale is missing or contradicts the file's.
    """
    found = find_network(name, "stage_a")
    own = found.published.config.scale
    if CLASS_KEY in found.opened.metadata:
        if scale is not None and scale != own:
            raise UserError(f"stage_a_scale is {scale} but {name} was trained with {own}")
        return found
    if scale is None:
        raise UserError(
            f"{name}: a published Stage A does not say its latents' scale; set stage_a_scale: "
            "0.43 (Stable Cascade) or 0.3764 (Würstchen v2)"
        )
    config = replace(found.published.config, scale=scale)
    return replace(found, published=replace(found.published, config=config))


def find_compressor(name: str) -> FoundNetwork:
    """Find a semantic compressor, or the autoencoder that stands in its place.

    Of a model that has both, the compressor is meant, also if it is damaged.

    Raises:
        UserError: Nothing is there, it is neither, or it can't be read.
    """
    try:
        return find_network(name, "compressor")
    except HoldsNone as error:
        try:
            return find_network(name, "autoencoder_kl")
        except HoldsNone:
            raise error from None


def stage_a_hash(name: str, scale: float | None) -> str:
    """Return what names Stage A's latents: the hash of its weights, and a scale that it is told."""
    found = find_stage_a(name, scale)
    weights = weights_hash(found.path)
    return weights if CLASS_KEY in found.opened.metadata else f"{weights}/{scale}"


def load_frozen(found: FoundNetwork, device: torch.device | str) -> Any:
    """Load a network in float32, in evaluation mode, without gradients."""
    network = build(found.opened, found.published, device=device, dtype=torch.float32)
    return network.requires_grad_(False)


def load_text(
    name: str,
    states: TextConfig | None,
    width: int | None = None,
    device: torch.device | str = "cpu",
) -> TextEncoder:
    """Load a text encoder."""
    found = find_text(name, width)
    return TextEncoder.from_folder(
        found.folder, states or TextConfig(), tokenizer_folder=found.tokenizer, device=device
    )


class FrozenEncoders:
    """The loaded networks, in evaluation mode and float32."""

    def __init__(self, paths: FrozenPaths, device: torch.device | str = "cpu") -> None:
        """Load what ``paths`` names.

        Raises:
            UserError: A file is missing or is another network's.
        """
        self.paths = paths
        self.device = torch.device(device)
        self.text: TextEncoder | None = None
        self.stage_a: StageA | None = None
        self.compressor: SemanticCompressor | AutoencoderKL | None = None
        self.image: PictureEncoder | None = None
        self.text_2: TextEncoder | None = None
        self.autoencoder: AutoencoderKL | None = None
        self.features: FeatureSource | None = None
        if paths.text is not None:
            self.text = load_text(paths.text, paths.text_states, paths.text_width, device)
        if paths.text_2 is not None:
            self.text_2 = load_text(paths.text_2, paths.text_states, paths.text_2_width, device)
        if paths.autoencoder is not None:
            found = find_network(paths.autoencoder, "autoencoder_kl")
            self.autoencoder = cast(AutoencoderKL, load_frozen(found, device))
        if paths.stage_a is not None:
            found = find_stage_a(paths.stage_a, paths.stage_a_scale)
            self.stage_a = cast(StageA, load_frozen(found, device))
        if paths.compressor is not None:
            found = find_compressor(paths.compressor)
            self.compressor = load_frozen(found, device)
        if paths.image is not None:
            folder = find_image_encoder(paths.image)
            self.image = PictureEncoder.from_folder(folder, torch.device(device))
        if paths.features is not None:
            self.features = FeatureSource(paths.features)
            self.features.teacher.load(self.device)

    def null_text(self) -> tuple[Tensor, Tensor] | None:
        """Return the hidden (L, D) and pooled (P,) states of the empty prompt."""
        if self.text is None:
            return None
        null = self.encode_captions([""])
        return null["text_hidden"][0].cpu(), null["text_pooled"][0].cpu()

    @torch.inference_mode()
    def encode_pixels(
        self,
        pixels: Tensor,
        compressor_fraction: float | None = None,
        skip: Collection[str] = (),
    ) -> dict[str, Tensor]:
        """Return the parts of a batch that are made of its pixels (B, 3, H, W).

        Args:
            pixels: In [0, 1].
            compressor_fraction: Fraction of their size that the compressor sees; None: its own.
            skip: Parts, keys of ``CACHE_FILES``, that are known already.

        Raises:
            UserError: A network does not take pictures of this size.
        """
        found = {}
        try:
            if self.stage_a is not None and "stage_a" not in skip:
                found["stage_a_latents"] = self.stage_a.encode(pixels)
            if self.compressor is not None and "stage_c" not in skip:
                compressor = self.compressor
                if compressor_fraction is None:
                    found["stage_c_latents"] = compressor.encode(pixels)
                else:
                    assert isinstance(compressor, SemanticCompressor), "Stage B takes no other"
                    seen = shrunk(pixels, compressor_fraction, compressor.stride)
                    found["stage_c_latents"] = compressor(seen)
            if self.image is not None:
                found["image_embeds"] = self.image(centre_square(pixels))
            if self.autoencoder is not None and "autoencoder" not in skip:
                mean, std = self.autoencoder.latent_gaussian(pixels)
                found |= {"autoencoder_mean": mean, "autoencoder_std": std}
            if self.features is not None:
                found["teacher_features"] = self.features.of_pixels(pixels)
        except ValueError as error:
            raise UserError(f"the network does not take these pictures: {error}") from error
        return found

    @torch.inference_mode()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """Return the text states of captions."""
        if self.text is None:
            return {}
        first = self.text.encode(captions)
        if self.text_2 is None:
            return {"text_hidden": first.hidden, "text_pooled": first.pooled}
        second = self.text_2.encode(captions)
        both = torch.cat([first.hidden, second.hidden], dim=-1)  # (B, L, D_1 + D_2)
        return {"text_hidden": both, "text_pooled": second.pooled}


class EncodeBatch(Callback):
    """Fills in a batch what its stream does not hold, before the step that needs it."""

    def __init__(self, paths: FrozenPaths, seed: int = 0) -> None:
        """Take the networks' names, which are loaded where the run trains, and the data's seed."""
        self.paths = paths
        self.seed = seed
        self.encoders: FrozenEncoders | None = None

    def load(self, device: torch.device) -> None:
        """Load the networks onto a device."""
        self.encoders = FrozenEncoders(self.paths, device)

    def unload(self) -> None:
        """Let go of the networks."""
        self.encoders = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the networks."""
        self.load(pl_module.device)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Encode the batch of the step."""
        assert isinstance(batch, CachedBatch)
        fraction = None
        if self.paths.compressor_input is not None:
            low, high = self.paths.compressor_input
            draws = step_draws(pl_module, self.seed, batch_idx)
            fraction = low + (high - low) * draws.scalar("compressor input")
        self.fill(batch, fraction)

    def fill(self, batch: CachedBatch, fraction: float | None = None) -> None:
        """Encode; under no autocast, as a cache is made.

        Args:
            batch: With pixels and captions.
            fraction: Of the pictures' size, which the compressor sees; None: its own.
        """
        assert self.encoders is not None, "load() comes first"
        device = self.encoders.device
        parts = self.encoders.encode_pixels(batch.require("pixels").to(device), fraction)
        for name, tensor in {**parts, **self.encoders.encode_captions(batch.captions)}.items():
            # A tensor of inference mode can't take part in a step; a copy can.
            setattr(batch, name, tensor.clone().to(device))


def shrunk(pixels: Tensor, fraction: float, multiple: int) -> Tensor:
    """Resize pictures (B, 3, H, W), antialiased, to a fraction of their size.

    Both sides are rounded down to a multiple of ``multiple``, and are at least that.
    """
    size = [max(multiple, int(side * fraction) // multiple * multiple) for side in pixels.shape[2:]]
    return F.interpolate(
        pixels.float(), size=size, mode="bilinear", antialias=True, align_corners=False
    )
