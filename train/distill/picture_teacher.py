"""A U-Net as the teacher of a cascade: it looks at the same pictures, in its own latent space.

The two models share no latents, so a teacher comes with its autoencoder. What it says of a picture
at little noise needs no caption: features are those of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from cascade.checkpoints.found import FoundNetwork
from cascade.checkpoints.load import build
from cascade.checkpoints.part_files import find_network, find_text, weights_hash
from cascade.checkpoints.said import said_in
from cascade.config import from_dict
from cascade.diffusion.discrete import time_of
from cascade.diffusion.prediction import Prediction, to_x0
from cascade.errors import UserError
from cascade.pipelines.unet_spec import UNET_DIFFUSION_KEY
from cascade.text.encoder import TextConfig, TextEncoder
from stages.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from stages.unet.config import NUM_SIZES
from stages.unet.features import Features, Site, sites
from stages.unet.unet import UNetCondition
from train.distill.teacher import FrozenTeacher, TeacherDtype
from train.losses.unet_denoising import UNetDiffusionConfig

_NOISE_SEED = 0
_LARGEST_AREA_RATIO = 1.25


@dataclass(frozen=True)
class PictureTeacherConfig:
    """A U-Net, its autoencoder, and what it was trained on."""

    unet: str
    """The U-Net: a file or folder in any layout, a model, or a hub id."""
    autoencoder: str
    """Its autoencoder, named likewise."""
    image_size: int
    """Side in pixels of the squares that it was trained on (1024 for SDXL); pictures of another
    area are refused, since it has no features of them worth imitating."""
    dtype: TeacherDtype = "bfloat16"
    """Number format of the U-Net; the autoencoder is float32."""
    text: str | None = None
    """Its text encoder, where no caption is the state of the empty prompt (SD); null: no caption
    is zeros (SDXL)."""
    text_states: TextConfig = field(
        default_factory=lambda: TextConfig("post_norm", masks_padding=False)
    )
    """How ``text`` is read."""


class PictureTeacher:
    """A frozen U-Net and its autoencoder, in evaluation mode, outside of any system."""

    def __init__(self, config: PictureTeacherConfig) -> None:
        """Find the weights; only headers are read.

        Raises:
            UserError: They are not there, or do not belong together.
        """
        self.config = config
        self.unet = FrozenTeacher(config.unet, config.dtype)
        self._found: FoundNetwork = find_network(config.autoencoder, "autoencoder_kl")
        self._autoencoder: AutoencoderKL | None = None
        self._empty: tuple[Tensor, Tensor] | None = None
        self.device = torch.device("cpu")
        self.diffusion = self._trained_with()
        self.sites: dict[str, Site] = sites(self.unet.config)
        latents, wanted = self.autoencoder_config.latent_channels, self.unet.config.in_channels
        if latents != wanted:
            raise UserError(
                f"teacher.autoencoder {config.autoencoder}: its latents have {latents} channels, "
                f"but {config.unet} takes {wanted}: they do not belong together"
            )
        if self.unet.config.text_pooled_channels is None and config.text is None:
            raise UserError(
                f"teacher.text is missing: {config.unet} is of SD's kind, whose no caption is the "
                "state of the empty prompt; name its text encoder"
            )
        if config.text is not None:
            width = find_text(config.text, self.unet.config.text_channels).width
            if width != self.unet.config.text_channels:
                raise UserError(
                    f"teacher.text {config.text}: its states are {width} wide, but {config.unet} "
                    f"reads {self.unet.config.text_channels}"
                )

    @property
    def autoencoder_config(self) -> AutoencoderKLConfig:
        """Sizes of its autoencoder."""
        return cast(AutoencoderKLConfig, self._found.published.config)

    def fingerprint(self) -> str:
        """Return what names its answers: hashes of the weights, and their number format."""
        config, parts = self.config, [self.unet_hash(), weights_hash(self._found.path)]
        if config.text is not None:
            found = find_text(config.text, self.unet.config.text_channels)
            states = config.text_states
            parts.append(f"{weights_hash(found.folder)}-{states.hidden}-{states.masks_padding}")
        return "/".join([*parts, config.dtype])

    def unet_hash(self) -> str:
        """Return the hash of the U-Net's weights."""
        return weights_hash(self.unet.path)

    def check_pictures(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Refuse pictures that it was not trained on, or that its autoencoder can't take.

        Args:
            shapes: Heights and widths in pixels.

        Raises:
            UserError: Naming the first that does not fit.
        """
        side, downscale = self.config.image_size, self.autoencoder_config.downscale
        for height, width in shapes:
            ratio = height * width / side**2
            if not 1 / _LARGEST_AREA_RATIO <= ratio <= _LARGEST_AREA_RATIO:
                raise UserError(
                    f"teacher.image_size is {side} but the pictures are {width}x{height}: the "
                    "teacher knows no pictures of this size; take another teacher or other data"
                )
            if height % downscale or width % downscale:
                raise UserError(
                    f"the pictures are {width}x{height}; the teacher's autoencoder needs "
                    f"multiples of {downscale} px"
                )

    def load(self, device: torch.device) -> None:
        """Load the weights onto a device."""
        self.device = device
        self.unet.load(device)
        network = build(
            self._found.opened, self._found.published, device=device, dtype=torch.float32
        )
        self._autoencoder = cast(AutoencoderKL, network.eval().requires_grad_(False))
        self._empty = self._no_caption(device)

    def unload(self) -> None:
        """Let go of the weights."""
        self.unet.unload()
        self._autoencoder, self._empty = None, None

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """Return the mean latents (B, 4, h, w) of pixels (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: The autoencoder does not take this size.
        """
        with torch.autocast(pixels.device.type, enabled=False):
            return self._loaded().latent_gaussian(pixels)[0]

    @torch.no_grad()
    def pixels(self, latents: Tensor) -> Tensor:
        """Return the pixels (B, 3, H, W), clamped to [0, 1], of latents (B, 4, h, w)."""
        with torch.autocast(latents.device.type, enabled=False):
            return self._loaded().decode(latents).clamp(0.0, 1.0)

    def features(self, latents: Tensor, timestep: int, wanted: Sequence[str]) -> Features:
        """Return features of clean latents at a timestep of little noise, without a caption.

        One noise serves all pictures, so that what is found is of the picture alone: it does not
        depend on how pictures are cut into batches.

        Args:
            latents: Clean, (B, 4, h, w).
            timestep: 0 to 999.
            wanted: Names of sites.

        Returns:
            Name -> (B, C, h', w') in float32.
        """
        generator = torch.Generator().manual_seed(_NOISE_SEED)
        noise = torch.randn(latents.shape[1:], generator=generator).to(latents)
        timesteps = torch.full((len(latents),), float(timestep), device=latents.device)
        alpha, sigma = self._scales(timesteps)
        x_t = alpha * latents + sigma * noise
        return self.maps(self.ask(x_t, timesteps, wanted=wanted)[1], latents)

    def maps(self, features: Features, latents: Tensor) -> Features:
        """Return features as maps (B, C, h', w'), float32, whether they came as tokens or not."""
        found = {}
        for name, one in features.items():
            site = self.sites[name]
            if site.tokens:
                height, width = site.size(latents.shape[-2], latents.shape[-1])
                one = one.unflatten(1, (height, width)).permute(0, 3, 1, 2)
            found[name] = one.float()
        return found

    def ask(
        self,
        x_t: Tensor,
        timesteps: Tensor,
        text: tuple[Tensor, Tensor] | None = None,
        wanted: Sequence[str] = (),
    ) -> tuple[Tensor, Features]:
        """Return its prediction, float32, and the features that are wanted, as they come.

        Args:
            x_t: Noised latents, (B, 4, h, w).
            timesteps: (B,), may be fractional.
            text: Hidden (B, L, D) and pooled (B, P) states of captions; None: no caption.
            wanted: Names of sites.
        """
        output = self.unet(x_t, timesteps, self._told(x_t, text), wanted)
        return output.prediction.float(), output.features

    def estimate(self, predicted: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """Return the estimate of the clean latents that a prediction amounts to, float32."""
        alpha, sigma = self._scales(timesteps)
        return to_x0(predicted, x_t, alpha, sigma, Prediction(self.diffusion.prediction))

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return clean latents (B, 4, h, w) with the noise of timesteps (B,)."""
        alpha, sigma = self._scales(timesteps)
        return alpha * latents + sigma * noise

    def timesteps_at(self, log_snr: Tensor) -> Tensor:
        """Return the timesteps (B,) of these log-SNRs, at least 0: it knows no cleaner picture."""
        schedule = self.diffusion.schedule
        return schedule.network_time(schedule.time_from_log_snr(log_snr)).clamp(min=0.0)

    def log_snr(self, timesteps: Tensor) -> Tensor:
        """Return the log-SNR of timesteps."""
        return self.diffusion.schedule.log_snr(time_of(timesteps))

    def _scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.diffusion.schedule(time_of(timesteps))
        return alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)

    def _told(self, x_t: Tensor, text: tuple[Tensor, Tensor] | None) -> UNetCondition:
        config, count = self.unet.config, len(x_t)
        if text is None:
            assert self._empty is not None, "load() comes first"
            text = tuple(one.expand(count, *one.shape[1:]) for one in self._empty)  # type: ignore[assignment]
        assert text is not None
        hidden, pooled = text
        if config.text_pooled_channels is None:
            return UNetCondition(hidden)
        side = self.autoencoder_config.downscale
        target = [x_t.shape[-2] * side, x_t.shape[-1] * side]
        told = torch.tensor([*target, 0, 0, *target], device=x_t.device).expand(count, -1)
        assert told.shape[1] == NUM_SIZES
        return UNetCondition(hidden, pooled, told)

    def _no_caption(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return hidden (1, L, D) and pooled (1, P) states of no caption."""
        sizes, name = self.unet.config, self.config.text
        if name is None:
            # All keys and values of zeros are alike: one token says what 77 do.
            hidden = torch.zeros(1, 1, sizes.text_channels, device=device)
            return hidden, torch.zeros(1, sizes.text_pooled_channels or 0, device=device)
        found = find_text(name, sizes.text_channels)
        encoder = TextEncoder.from_folder(
            found.folder, self.config.text_states, tokenizer_folder=found.tokenizer, device=device
        )
        with torch.no_grad():
            states = encoder.encode([""])
        return states.hidden.clone(), states.pooled.clone()

    def _trained_with(self) -> UNetDiffusionConfig:
        """Return what the U-Net's file says of its prediction and schedule; else the published."""
        said = said_in(self.unet.metadata, UNET_DIFFUSION_KEY, self.config.unet)
        return from_dict(UNetDiffusionConfig, said, f"{self.config.unet} (how it was trained)")

    def _loaded(self) -> AutoencoderKL:
        assert self._autoencoder is not None, "load() comes first"
        return self._autoencoder


def default_site(known: dict[str, Site]) -> str:
    """Return the last self-attention of the first block on the way up that has one.

    Raises:
        UserError: There is none.
    """
    on_the_way_up = [
        name
        for name, site in known.items()
        if site.kind == "self_attention" and name.startswith("up_blocks.")
    ]
    if not on_the_way_up:
        raise UserError("the teacher has no self-attention on its way up; name a site")
    first = ".".join(on_the_way_up[0].split(".")[:2]) + "."
    return [name for name in on_the_way_up if name.startswith(first)][-1]
