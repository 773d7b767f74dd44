"""The cascade: prompt -> Stage C latents -> Stage B latents -> pixels.

Stage C draws a tiny picture of meaning from text, Stage B fills in what Stage A's decoder needs,
and Stage A turns that into pixels.

Reference: Pernias et al., 2023, Wuerstchen, arXiv:2306.00637.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cascade.checkpoints.hub import resolve
from cascade.diffusion.samplers import StepInfo
from cascade.errors import UserError
from cascade.images import pixels_to_images
from cascade.pipelines.finite import check_finite, check_not_black
from cascade.pipelines.fit import check_fit
from cascade.pipelines.memory_plan import MemoryPlan
from cascade.pipelines.offload import Memory, check_request
from cascade.pipelines.parts import Dialect, Source, open_source
from cascade.pipelines.placement import DtypeChoice, pick_device, pick_dtypes
from cascade.pipelines.plan import Plan, make_plan
from cascade.pipelines.prompts import PromptStates
from cascade.pipelines.results import (
    CascadeOutput,
    Interrupted,
    Picture,
    Reconstruction,
    collect,
    describe,
)
from cascade.pipelines.sampling import sample_stage_b, sample_stage_c
from cascade.pipelines.tiles import decode_pixels
from cascade.pipelines.watch import Clock, OnPreview, Watch
from cascade.rng import PictureNoise
from stages.previewer import Previewer
from stages.semantic_compressor import SemanticCompressor

GPU_BATCH_SIZE = 4
"""Pictures that run together on a GPU unless the caller says otherwise."""


class CascadePipeline:
    """A loaded cascade; call it with a prompt.

    On a CPU pictures run through the networks one at a time, so that a picture of a batch equals
    the same seed alone bit by bit: matrix products of another batch size round differently. On
    GPUs they run in batches of four and may differ in the last bits; ``batch_size=1`` prevents it.
    """

    def __init__(
        self,
        folder: str | Path | Source,
        *,
        device: str = "auto",
        dtype: DtypeChoice = "auto",
        offload: str | None = None,
        vram: float | None = None,
    ) -> None:
        """Load a model folder; nothing is downloaded.

        Args:
            folder: A folder of ours or of published weights, or what ``open_source`` made of one.
            device: "auto", "cpu", "cuda", "cuda:1", "mps".
            dtype: Number format of the stages: "auto", "float32", "bfloat16", "float16", or one
                for each: see ``pick_dtypes``.
            offload: See ``place``.
            vram: See ``place``.

        Raises:
            UserError: If something is missing or does not fit.
        """
        self._source = open_source(folder) if isinstance(folder, (str, Path)) else folder
        self.folder = self._source.folder
        self.spec = self._source.spec
        self.device = pick_device(str(device))
        self.dtypes = pick_dtypes(dtype, self.device)
        check_request(offload, vram, self.device)
        # What leaves the device again must never have been on it all at once.
        moves = vram is not None or offload not in (None, "none")
        home = torch.device("cpu") if moves else self.device
        self._parts = self._source.load(home, self.dtypes)
        self.text_encoder = self._parts.text
        self.text_encoder_b = self._parts.text_b or self._parts.text
        self.stage_c = self._parts.stage_c
        self.stage_b = self._parts.stage_b
        self.stage_a = self._parts.stage_a
        check_fit(self.text_encoder, self.stage_c, self.stage_b, self.stage_a, str(self.folder))
        cell = self.stage_a.downscale * self.stage_b.config.latent_multiple
        if self.spec.size_multiple % cell:
            raise UserError(
                f"{self.folder}: the model's size_multiple is {self.spec.size_multiple}, but "
                f"Stage A and Stage B together need multiples of {cell} pixels"
            )

        self.memory = Memory(self._parts, self.device, self.dtypes)
        self.place(offload=offload, vram=vram)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        device: str = "auto",
        dtype: DtypeChoice = "auto",
        offload: str | None = None,
        vram: float | None = None,
    ) -> CascadePipeline:
        """Load a model folder; the network is never touched."""
        return cls(folder, device=device, dtype=dtype, offload=offload, vram=vram)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: str = "auto",
        dtype: DtypeChoice = "auto",
        offload: str | None = None,
        vram: float | None = None,
        revision: str | None = None,
        variant: str | None = None,
        dialect: Dialect = "official",
        lite: bool = False,
    ) -> CascadePipeline:
        """Load a model folder, or fetch ``organisation/name`` from the hub and load that.

        Args:
            model: A folder, or ``organisation/name[:lite][@revision]`` on the hub.
            device: See the constructor.
            dtype: See the constructor.
            offload: See ``place``.
            vram: See ``place``.
            revision: A branch, tag or commit on the hub; see ``resolve`` for two repositories.
            variant: The mark of a set of weights, such as "bf16"; None: the unmarked one.
            dialect: For published weights: sampled as their authors do, or as diffusers does.
            lite: For published weights in several sizes: take the smaller ones.

        Raises:
            UserError: If it is neither, cannot be fetched, or does not fit.
        """
        files = resolve(model, revision=revision, variant=variant, lite=lite)
        source = open_source(files, dialect=dialect)
        return cls(source, device=device, dtype=dtype, offload=offload, vram=vram)

    def place(self, *, offload: str | None = None, vram: float | None = None) -> None:
        """Place the networks anew, from any placement to any other; pictures stay the same.

        The weights of a network that is away are meta tensors; ``place()`` brings all back.

        Args:
            offload: "none": all stay on the device. "model": each is there for its own stage.
                "sequential": they come layer by layer. None: as ``vram`` needs it, else "none".
            vram: GiB of the GPU that may be used; each run then picks the fastest plan that fits.

        Raises:
            UserError: For an unknown mode, or memory that is not there.
        """
        self.memory.place(offload, vram)

    def arrange(self, plan: Plan, *, batch_size: int | None = None) -> MemoryPlan:
        """Place the networks as a run of this plan needs it, and return how; ``run`` does it too.

        Raises:
            UserError: If nothing fits into ``vram``, saying what would.
        """
        size = self.spec.stage_c_size((plan.height, plan.width))
        shape = self._latent_shape(plan.height, plan.width, torch.empty(0, *size))
        return self.memory.arrange(plan, size, shape, batch_size, GPU_BATCH_SIZE)

    @cached_property
    def compressor(self) -> SemanticCompressor:
        """The semantic compressor, loaded when a picture is first encoded."""
        network: SemanticCompressor = self._parts.extra("compressor", str(self.folder))
        size = (self.spec.image_size, self.spec.image_size)
        made, declared = network.config.latent_size(size), self.spec.stage_c_size(size)
        if made != declared:
            raise UserError(
                f"{self.folder}: the compressor's latents are {made}, but by model.json's "
                f"pixels_per_stage_c_cell they are {declared}"
            )
        self.memory.add("compressor", network)
        return network

    @cached_property
    def previewer(self) -> Previewer:
        """The previewer, loaded when a preview is first asked for."""
        network: Previewer = self._parts.extra("previewer", str(self.folder))
        self.memory.add("previewer", network)
        return network

    @cached_property
    def weights_hash(self) -> str:
        """Hash over the model's files, as stored in pictures."""
        return self._source.weights_hash()

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        num_images: int = 1,
        steps_c: int | None = None,
        steps_b: int | None = None,
        guidance_c: float | None = None,
        guidance_b: float | None = None,
        sampler: str | None = None,
        width: int | None = None,
        height: int | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
        on_preview: OnPreview | None = None,
        preview_every: int = 4,
    ) -> CascadeOutput:
        """Make pictures of prompts.

        Args:
            prompt: One prompt or several.
            negative_prompt: What pictures are steered away from.
            seed: Seed of each prompt's first picture; the next ones count up. None draws one.
            seeds: One seed for each picture instead.
            num_images: Pictures for each prompt.
            steps_c: Steps of Stage C; None, here and below, is the model's own value.
            steps_b: Steps of Stage B.
            guidance_c: Guidance scale of Stage C; 1 is off.
            guidance_b: Guidance scale of Stage B; 1 is off.
            sampler: "ddpm", "ddim" or "dpmpp_2m", for both stages.
            width: Width in pixels, rounded to what the model makes.
            height: Height in pixels, rounded to what the model makes.
            batch_size: Pictures that run together; None is 1 on a CPU and 4 on a GPU.
            progress: Show a bar for each stage; None does on a terminal.
            on_preview: Called with rough pictures while Stage C runs.
            preview_every: Stage C steps between previews.

        Raises:
            UserError: For anything that cannot be made, before any of it is.
            NonFiniteError: If a stage gives values that are not finite.
            Interrupted: On Ctrl-C; it holds the pictures that were finished.
        """
        plan = make_plan(
            self.spec,
            prompt,
            negative_prompt=negative_prompt,
            seed=seed,
            seeds=seeds,
            num_images=num_images,
            steps_c=steps_c,
            steps_b=steps_b,
            guidance_c=guidance_c,
            guidance_b=guidance_b,
            sampler=sampler,
            width=width,
            height=height,
        )
        finished: list[Picture] = []
        try:
            for picture in self.run(
                plan,
                batch_size=batch_size,
                progress=progress,
                on_preview=on_preview,
                preview_every=preview_every,
            ):
                finished.append(picture)
        except KeyboardInterrupt as error:
            raise Interrupted(finished, len(plan.requests)) from error
        return collect(finished, plan.notices)

    def run(
        self,
        plan: Plan,
        *,
        batch_size: int | None = None,
        progress: bool | None = None,
        on_preview: OnPreview | None = None,
        preview_every: int = 4,
    ) -> Iterator[Picture]:
        """Make a plan's pictures one after the other and give each as soon as it is finished.

        Raises:
            UserError: If ``batch_size`` or ``preview_every`` is below 1.
            NonFiniteError: If a stage gives values that are not finite.
        """
        if (batch_size is not None and batch_size < 1) or preview_every < 1:
            raise UserError(
                f"batch_size {batch_size} and preview_every {preview_every} must be at least 1"
            )
        if on_preview is not None:
            _ = self.previewer  # a model without one: now, not after Stage C's first steps
        memory = self.arrange(plan, batch_size=batch_size)
        if batch_size is None:
            batch_size = memory.batch_size or (1 if self.device.type == "cpu" else GPU_BATCH_SIZE)
        prompts = [request.prompt for request in plan.requests]
        states = self._prompt_states([*prompts, plan.negative_prompt])
        for batch in self._batches(plan, states, batch_size):
            watch = Watch(batch, len(plan.requests), progress, on_preview, preview_every)
            yield from self._make_batch(plan, states, watch)

    def encode_picture(self, pixels: Tensor) -> Tensor:
        """Compress pictures into Stage C latents.

        Args:
            pixels: ``(B, 3, H, W)`` in [0, 1].

        Returns:
            ``(B, 16, h, w)`` float32 on the pipeline's device, ready for diffusion.
        """
        self._check_pixels(pixels)
        compressor = self.compressor
        with torch.inference_mode(), self.memory.on("compressor"):
            latents = compressor.encode(pixels.to(self.device)).float()
        check_finite(latents, "the semantic compressor", self.dtypes.of("compressor"))
        return latents

    def reconstruct(
        self,
        pixels: Tensor,
        *,
        through: Literal["a", "ab"] = "ab",
        seeds: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Reconstruction:
        """Send pictures down the cascade and up again; all of them run together.

        Args:
            pixels: ``(B, 3, H, W)`` in [0, 1], both sides multiples of the model's.
            through: "a" is Stage A alone; "ab" is the compressor, Stage B sampling, and Stage A.
            seeds: One for each picture's Stage B noise; None is 0 for all.
            prompts: What Stage B is told beside the latents; None is the null prompt.

        Raises:
            UserError: If shapes, seeds or prompts do not fit.
        """
        if through not in ("a", "ab"):
            raise UserError(f"through {through!r}: 'a' or 'ab'")
        self._check_pixels(pixels)
        count, (height, width) = len(pixels), pixels.shape[-2:]
        if height % self.spec.size_multiple or width % self.spec.size_multiple:
            raise UserError(
                f"pixels of shape {tuple(pixels.shape)}: (B, 3, H, W) with sides that are "
                f"multiples of {self.spec.size_multiple} are needed"
            )
        seeds = [0] * count if seeds is None else list(seeds)
        prompts = [""] * count if prompts is None else list(prompts)
        if len(seeds) != count or len(prompts) != count:
            raise UserError(f"{count} pictures, {len(seeds)} seeds and {len(prompts)} prompts")
        with torch.inference_mode():
            if through == "a":
                dtype = self.dtypes.stage_a
                with self.memory.on("stage_a"):
                    latents = self.stage_a.encode(pixels.to(self.device, dtype)).float()
                check_finite(latents, "Stage A's encoder", dtype)
                return Reconstruction(self._decode(latents).cpu(), None, latents.cpu())
            stage_c_latents = self.encode_picture(pixels)
            prompted_b = self._prompt_states([*prompts, ""])[1].pair(prompts, "")
            with self.memory.on("stage_b"):
                latents = sample_stage_b(
                    self.stage_b,
                    self.spec.stage_b,
                    self._told(stage_c_latents),
                    prompted_b,
                    PictureNoise(seeds, "stage_b"),
                    self._latent_shape(height, width, stage_c_latents),
                )
            return Reconstruction(self._decode(latents).cpu(), stage_c_latents.cpu(), latents.cpu())

    @torch.inference_mode()
    def _make_batch(
        self, plan: Plan, states: tuple[PromptStates, PromptStates], watch: Watch
    ) -> list[Picture]:
        """Run one batch through all stages."""
        requests = [plan.requests[index] for index in watch.batch]
        seeds = [request.seed for request in requests]
        clock = Clock(self.device)

        with clock("text"):
            prompts = [request.prompt for request in requests]
            prompted, prompted_b = (one.pair(prompts, plan.negative_prompt) for one in states)

        on = self.memory.on
        with clock("stage_c"), on("stage_c"), watch.stage("Stage C", plan.stage_c.steps) as count:

            def on_step(info: StepInfo) -> None:
                count(info)
                if watch.wants_preview(info):
                    watch.show(info, self._preview(info.x0_hat))

            stage_c_latents = sample_stage_c(
                self.stage_c,
                plan.stage_c,
                prompted,
                PictureNoise(seeds, "stage_c"),
                self.spec.stage_c_size((plan.height, plan.width)),
                on_step=on_step,
            )

        with clock("stage_b"), on("stage_b"), watch.stage("Stage B", plan.stage_b.steps) as count:
            stage_b_latents = sample_stage_b(
                self.stage_b,
                plan.stage_b,
                self._told(stage_c_latents),
                prompted_b,
                PictureNoise(seeds, "stage_b"),
                self._latent_shape(plan.height, plan.width, stage_c_latents),
                on_step=count,
            )

        with clock("stage_a"):
            pixels = self._decode(stage_b_latents).cpu()
        check_not_black(pixels, self.dtypes.stage_a)
        seconds = {name: value / len(requests) for name, value in clock.seconds.items()}
        return [
            Picture(
                image=image,
                pixels=pixels[row],
                prompt=request.prompt,
                seed=request.seed,
                stage_c_latents=stage_c_latents[row].cpu(),
                stage_b_latents=stage_b_latents[row].cpu(),
                seconds=seconds,
                metadata=self._metadata(plan, watch.batch[row]),
            )
            for row, (request, image) in enumerate(
                zip(requests, pixels_to_images(pixels), strict=True)
            )
        ]

    def _metadata(self, plan: Plan, index: int) -> dict[str, str]:
        weights, dtypes = self.weights_hash, str(self.dtypes)
        return describe(plan, index, model=self.spec.name, weights=weights, dtype=dtypes)

    @staticmethod
    def _batches(
        plan: Plan, states: tuple[PromptStates, PromptStates], batch_size: int
    ) -> Iterator[range]:
        """Cut the pictures into batches of prompts of one length.

        A longer neighbour would lengthen a prompt, and so change its picture.
        """
        start = 0
        lengths = [
            tuple(one.num_windows([request.prompt, plan.negative_prompt]) for one in states)
            for request in plan.requests
        ]
        for index in range(1, len(lengths) + 1):
            ends = index == len(lengths) or lengths[index] != lengths[start]
            if ends or index - start == batch_size:
                yield range(start, index)
                start = index

    def _check_pixels(self, pixels: Tensor) -> None:
        """Refuse what is no batch of RGB pictures in [0, 1]."""
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise UserError(
                f"pixels of shape {tuple(pixels.shape)} and type {pixels.dtype}: floating-point "
                "(B, 3, H, W) in [0, 1] are needed"
            )
        if len(pixels) and not (pixels.amin() >= 0 and pixels.amax() <= 1):
            raise UserError(
                f"pixels from {float(pixels.amin()):g} to {float(pixels.amax()):g}: they must lie "
                "in [0, 1]; divide 8-bit values by 255"
            )

    def _prompt_states(self, prompts: Sequence[str] = ()) -> tuple[PromptStates, PromptStates]:
        """Return what Stage C and Stage B read of prompts; the same if they share an encoder.

        An encoder that leaves the device again encodes ``prompts``, the run's, at its first visit.
        """
        states = self.memory.prompt_states("text", self.text_encoder, prompts)
        if self.text_encoder_b is self.text_encoder:
            return states, states
        return states, self.memory.prompt_states("text_b", self.text_encoder_b, prompts)

    def _told(self, stage_c_latents: Tensor) -> Tensor:
        """Return Stage C's latents in the scale that Stage B was trained on."""
        return stage_c_latents * self.spec.stage_c_scale - self.spec.stage_c_shift

    def _latent_shape(
        self, height: int, width: int, stage_c_latents: Tensor
    ) -> tuple[int, int, int]:
        """Shape of a picture's Stage B latents."""
        channels, cells = (
            self.stage_a.config.latent_channels,
            self.spec.stage_b_cells_per_stage_c_cell,
        )
        if cells is None:
            side = self.stage_a.downscale
            return channels, height // side, width // side
        rows, columns = (int(side * cells) for side in stage_c_latents.shape[-2:])
        multiple = self.stage_b.config.latent_multiple
        if rows % multiple or columns % multiple:
            raise UserError(
                f"{width}x{height}: by diffusers' rule Stage A's latents are {columns}x{rows}, but "
                f"Stage B takes multiples of {multiple}; use another size, or the official dialect"
            )
        return channels, rows, columns

    def _decode(self, stage_b_latents: Tensor) -> Tensor:
        """Turn Stage B latents into pixels ``(B, 3, H, W)``, float32 in [0, 1]."""
        with self.memory.on("stage_a"):
            return decode_pixels(
                self.stage_a, stage_b_latents, self.dtypes.stage_a, self.memory.plan.tile
            )

    def _preview(self, x0_hat: Tensor) -> Tensor:
        dtype = self.dtypes.of("previewer")
        with self.memory.on("previewer"):
            pixels: Tensor = self.previewer(x0_hat.to(dtype)).float()
        check_finite(pixels, "the previewer", dtype)
        return pixels
