"""A U-Net of SD or SDXL, or a student of theirs: prompt -> latents -> pixels.

The U-Net draws latents from text, or from the noised latents of a picture and text, and its
autoencoder turns them into pixels.

References: Rombach et al., 2022, arXiv:2112.10752; Podell et al., 2023, SDXL, arXiv:2307.01952;
Meng et al., 2022, SDEdit, arXiv:2108.01073 (from a picture).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cascade.checkpoints.hub import resolve
from cascade.cuda_graphs import CudaGraphs
from cascade.diffusion.samplers import StepInfo
from cascade.errors import UserError
from cascade.images import ImageLike, as_image, pixels_to_images
from cascade.pipelines.finite import check_finite, check_not_black
from cascade.pipelines.loaded import GPU_BATCH_SIZE
from cascade.pipelines.memory_plan import MemoryPlan
from cascade.pipelines.offload import check_request
from cascade.pipelines.picture_input import PictureInput
from cascade.pipelines.placement import (
    DtypeChoice,
    format_said,
    pick_device,
    pick_unet_dtypes,
    round_weights,
)
from cascade.pipelines.prompts import PromptStates, batches_of
from cascade.pipelines.results import (
    UNetPicture,
    UNetPictures,
    collect_unet,
    gather,
    picture_settings,
    text_of,
)
from cascade.pipelines.sampling import Start
from cascade.pipelines.tiles import decode_blended, encode_blended
from cascade.pipelines.unet_fit import check_unet_fit
from cascade.pipelines.unet_lora import LoraChoice
from cascade.pipelines.unet_memory import UNetMemory
from cascade.pipelines.unet_parts import UNetSource, open_unet_source
from cascade.pipelines.unet_plan import UNetPlan, UNetSettings, make_unet_plan
from cascade.pipelines.unet_preview import colours_of
from cascade.pipelines.unet_sampling import sample_unet, told_of
from cascade.pipelines.watch import Clock, OnPreview, Watch
from cascade.rng import PictureNoise
from stages.autoencoder_kl import DiagonalGaussian

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11


class UNetPipeline:
    """A loaded U-Net with its text encoders and its autoencoder; call it with a prompt.

    Pictures of a batch are made as :class:`cascade.pipelines.cascade.CascadePipeline` makes them:
    one at a time on a CPU, four together on a GPU.
    """

    def __init__(
        self,
        source: str | Path | UNetSource,
        *,
        device: str = "auto",
        dtype: DtypeChoice = "auto",
        offload: str | None = None,
        vram: float | None = None,
        int8: bool = False,
    ) -> None:
        """Load a folder of diffusers or a single file; nothing is downloaded.

        Args:
            source: The folder, the file, or what ``open_unet_source`` made of one.
            device: "auto", "cpu", "cuda", "cuda:1", "mps".
            dtype: Number format: "auto", "float32", "bfloat16", "float16", or one for each of
                "unet" and "autoencoder": see ``pick_unet_dtypes``.
            offload: See ``place``.
            vram: See ``place``.
            int8: Keep the U-Net's linear layers in int8; see ``round_weights``.

        Raises:
            UserError: If something is missing or does not fit.
        """
        if isinstance(source, (str, Path)):
            source = open_unet_source(source)
        self._source = source
        self.folder = source.folder
        self.spec = source.spec
        self.device = pick_device(str(device))
        self.dtypes, self.notices = pick_unet_dtypes(
            dtype, self.device, autoencoder_in_float16=self.spec.autoencoder_in_float16
        )
        check_request(offload, vram, self.device)
        # What leaves the device again must never have been on it all at once.
        moves = vram is not None or offload not in (None, "none")
        self._parts = source.load(torch.device("cpu") if moves else self.device, self.dtypes)
        self.int8 = int8
        if int8:
            round_weights(self._parts.unet, "the U-Net")
        self.unet = self._parts.unet
        self.autoencoder = self._parts.autoencoder
        check_unet_fit(self._parts, source.where)
        self.graphs: CudaGraphs | None = None  # see ``use_cuda_graphs``
        self.memory = UNetMemory(self._parts, self.device, self.dtypes)
        self.place(offload=offload, vram=vram)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        unet: Path | None = None,
        loras: Sequence[LoraChoice] = (),
        device: str = "auto",
        dtype: DtypeChoice = "auto",
        offload: str | None = None,
        vram: float | None = None,
        int8: bool = False,
        revision: str | None = None,
        variant: str | None = None,
    ) -> Self:
        """Load a folder or a single file, or fetch ``organisation/name`` from the hub first.

        Args:
            model: The folder, the file, or ``organisation/name[@revision]``.
            unet: A U-Net to run in place of the model's own: its file, or its folder.
            loras: LoRAs to merge into its networks; their files, and how much each counts.
            device: See the constructor.
            dtype: See the constructor.
            offload: See ``place``.
            vram: See ``place``.
            int8: See the constructor.
            revision: A branch, tag or commit on the hub.
            variant: The mark of a set of weights, such as "fp16"; None: the unmarked one.

        Raises:
            UserError: If it is neither, cannot be fetched, or does not fit.
        """
        source = open_unet_source(resolve(model, revision=revision, variant=variant), unet, loras)
        return cls(source, device=device, dtype=dtype, offload=offload, vram=vram, int8=int8)

    def __call__(
        self,
        prompt: str | Sequence[str],
        settings: UNetSettings | None = None,
        *,
        batch_size: int | None = None,
        progress: bool | None = None,
        on_preview: OnPreview | None = None,
        preview_every: int = 4,
    ) -> UNetPictures:
        """Make pictures of prompts.

        Args:
            prompt: One prompt or several.
            settings: Everything else; None leaves all of it to the model.
            batch_size: Pictures that run together; None is 1 on a CPU and 4 on a GPU.
            progress: Show a bar; None does on a terminal.
            on_preview: Called with rough pictures while the U-Net runs.
            preview_every: Steps between previews.

        Raises:
            UserError: For anything that cannot be made, before any of it is.
            NonFiniteError: If a network gives values that are not finite.
            Interrupted: On Ctrl-C; it holds the pictures that were finished.
        """
        plan = make_unet_plan(self.spec, prompt, settings)
        return self.make(
            plan,
            batch_size=batch_size,
            progress=progress,
            on_preview=on_preview,
            preview_every=preview_every,
        )

    def image_to_image(
        self,
        image: ImageLike,
        prompt: str | Sequence[str],
        strength: float | None = None,
        settings: UNetSettings | None = None,
    ) -> UNetPictures:
        """Change a picture by a prompt: noise its latents and denoise them.

        Args:
            image: The picture, or its file.
            prompt: One prompt or several.
            strength: Share in (0, 1] of the steps that are walked, the last ones, rounded down:
                the more, the less of the picture is left. None is 0.8.
            settings: Everything else.

        Raises:
            UserError: If that is less than one step, and as a call does.
        """
        given = PictureInput(as_image(image), "img2img", None, strength)
        return self.make(make_unet_plan(self.spec, prompt, settings, picture=given))

    def make(
        self,
        plan: UNetPlan,
        *,
        batch_size: int | None = None,
        progress: bool | None = None,
        on_preview: OnPreview | None = None,
        preview_every: int = 4,
    ) -> UNetPictures:
        """Make all pictures of a plan; the arguments and errors are those of a call."""
        pictures = self.run(
            plan,
            batch_size=batch_size,
            progress=progress,
            on_preview=on_preview,
            preview_every=preview_every,
        )
        finished = gather(pictures, len(plan.requests))
        return collect_unet(finished, [*plan.notices, *self.notices])

    def run(
        self,
        plan: UNetPlan,
        *,
        batch_size: int | None = None,
        progress: bool | None = None,
        on_preview: OnPreview | None = None,
        preview_every: int = 4,
    ) -> Iterator[UNetPicture]:
        """Make a plan's pictures one after the other and give each as soon as it is finished.

        Raises:
            UserError: If a number is below 1, or the colours of this model's latents are unknown.
            NonFiniteError: If a network gives values that are not finite.
        """
        if (batch_size is not None and batch_size < 1) or preview_every < 1:
            raise UserError(
                f"batch_size {batch_size} and preview_every {preview_every} must be at least 1"
            )
        if on_preview is not None:  # now, not after the first steps
            colours_of(self.autoencoder.config, self.folder)
        memory = self.arrange(plan, batch_size=batch_size)
        if batch_size is None:
            batch_size = memory.batch_size or (1 if self.device.type == "cpu" else GPU_BATCH_SIZE)
        states = self._prompt_states(
            [*(request.prompt for request in plan.requests), plan.negative_prompt]
        )
        given = None if plan.picture is None else self.encode(plan.picture.pixels)
        for batch in batches_of(plan, states, batch_size):
            watch = Watch(batch, len(plan.requests), progress, on_preview, preview_every)
            yield from self._make_batch(plan, states, given, watch)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that make a picture of a prompt."""
        networks: dict[str, nn.Module] = {"autoencoder": self.autoencoder}
        return {**networks, **{str(name): one for name, one in self._parts.updatable.items()}}

    @property
    def weights_hash(self) -> str:
        """12 hex digits that tell its weights from others."""
        return self._source.weights_hash

    def place(self, *, offload: str | None = None, vram: float | None = None) -> None:
        """Place the networks anew, from any placement to any other; pictures stay the same.

        Args:
            offload: "none": all stay on the device. "model": each is there for its own part of the
                work. "sequential": they come layer by layer. None: as ``vram`` needs it, else
                "none".
            vram: GiB of the GPU that may be used; each run then picks the fastest plan that fits.

        Raises:
            UserError: For an unknown mode, or memory that is not there.
        """
        self.memory.place(offload, vram)

    def arrange(self, plan: UNetPlan, *, batch_size: int | None = None) -> MemoryPlan:
        """Place the networks as a run of this plan needs it, and return how; ``run`` does it too.

        Raises:
            UserError: If nothing fits into ``vram``, saying what would.
        """
        shape = self.latent_shape(plan.height, plan.width)
        return self.memory.arrange(plan, shape, batch_size, GPU_BATCH_SIZE)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape of a picture's latents."""
        cell = self.autoencoder.downscale
        return self.autoencoder.config.latent_channels, height // cell, width // cell

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> DiagonalGaussian:
        """Return the Gaussian of a picture's latents; in tiles as ``decode``.

        Args:
            pixels: ``(1, 3, H, W)`` in [0, 1], of a size that the model makes.

        Raises:
            NonFiniteError: If a value is not finite.
        """
        tile = self.memory.plan.encoder_tile
        with self.memory.on("autoencoder"):
            if tile is None:
                posterior = self.autoencoder.posterior(pixels.to(self.device))
            else:
                posterior = encode_blended(self.autoencoder, pixels, self.device, tile)
        check_finite(posterior.mean, "the autoencoder's encoder", self.dtypes.autoencoder)
        return posterior

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents into pixels ``(B, 3, H, W)``, float32 in [0, 1].

        Where memory leaves no other way it is done in tiles, which differ from the whole: see
        ``tiles``.

        Raises:
            NonFiniteError: If a value is not finite.
        """
        tile = self.memory.plan.tile
        with self.memory.on("autoencoder"):
            if tile is None:
                # One at a time: at 1024 pixels one alone takes gigabytes.
                pixels = torch.cat([self.autoencoder.decode(one) for one in latents.split(1)])
            else:
                pixels = decode_blended(self.autoencoder, latents, tile)
        check_finite(pixels, "the autoencoder", self.dtypes.autoencoder)
        return pixels.clamp(0, 1)

    def _prompt_states(self, prompts: Sequence[str]) -> list[PromptStates]:
        """Return what the U-Net reads of prompts, by each text encoder."""
        states = [self.memory.prompt_states("text", self._parts.text, prompts)]
        if self._parts.text_2 is not None:
            states.append(self.memory.prompt_states("text_2", self._parts.text_2, prompts))
        return states

    @torch.inference_mode()
    def _make_batch(
        self,
        plan: UNetPlan,
        states: Sequence[PromptStates],
        given: DiagonalGaussian | None,
        watch: Watch,
    ) -> list[UNetPicture]:
        requests = [plan.requests[index] for index in watch.batch]
        seeds = [request.seed for request in requests]
        clock = Clock(self.device)
        with clock("text"):
            prompted = told_of(
                states[0],
                states[1] if len(states) > 1 else None,
                [request.prompt for request in requests],
                plan.negative_prompt,
                plan.sizes,
                empty_is_zeros=self.spec.empty_negative == "zeros",
            )
        start = self._start(plan, given, seeds)
        with clock("unet"), self.memory.on("unet"), watch.stage("U-Net", plan.steps) as count:

            def on_step(info: StepInfo) -> None:
                count(info)
                if watch.wants_preview(info):
                    colours = colours_of(self.autoencoder.config, self.folder)
                    watch.show(info, colours.pixels(info.x0_hat))

            latents = sample_unet(
                self.unet,
                plan.sampling,
                prompted,
                PictureNoise(seeds, "unet"),
                self.latent_shape(plan.height, plan.width),
                start=start,
                graphs=self.graphs,
                on_step=on_step,
            )
        with clock("autoencoder"):
            pixels = self.decode(latents).cpu()
        check_not_black(pixels, self.dtypes.autoencoder, "the autoencoder")
        seconds = {name: value / len(requests) for name, value in clock.seconds.items()}
        return [
            UNetPicture(
                image=image,
                pixels=pixels[row],
                prompt=request.prompt,
                seed=request.seed,
                latents=latents[row].cpu(),
                seconds=seconds,
                metadata=self._metadata(plan, watch.batch[row]),
            )
            for row, (request, image) in enumerate(
                zip(requests, pixels_to_images(pixels), strict=True)
            )
        ]

    def _start(
        self, plan: UNetPlan, given: DiagonalGaussian | None, seeds: Sequence[int]
    ) -> Start | None:
        """Draw each seed's sample of the picture's latents: the U-Net learned samples, not means.

        Their noise is a stream of its own: a seed's other noise is that of a prompt alone.
        """
        if given is None or plan.picture is None:
            return None
        noise = PictureNoise(seeds, "autoencoder")
        latents = self.autoencoder.latents_of(
            given, lambda mean: noise.randn(mean.shape[1:]).to(mean)
        )
        return Start(latents, plan.picture.strength)

    def _metadata(self, plan: UNetPlan, index: int) -> dict[str, str]:
        settings: dict[str, object] = {"unet": vars(plan.sampling)}
        if plan.picture is not None:
            settings["picture"] = picture_settings(plan.picture)
        if plan.sizes is not None:
            settings["sizes"] = list(plan.sizes.values())
        if self._source.loras:
            settings["loras"] = [one.described for one in self._source.loras]
        tiles = {"tile": self.memory.plan.tile, "encoder_tile": self.memory.plan.encoder_tile}
        for name, tile in tiles.items():
            if tile is not None:  # the picture is another one than without
                settings[name] = tile * self.autoencoder.downscale
        return text_of(
            plan,
            index,
            settings,
            model=self.spec.name,
            weights=self._source.weights_hash,
            dtype=format_said(self.dtypes, self.int8),
        )
