"""The cascade: prompt -> Stage C latents -> Stage B latents -> pixels.

Stage C draws a tiny picture of meaning from text, Stage B fills in what Stage A's decoder needs,
and Stage A turns that into pixels.

Reference: Pernias et al., 2023, Wuerstchen, arXiv:2306.00637.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from cascade.diffusion.samplers import StepInfo
from cascade.errors import UserError
from cascade.images import ImageLike, as_image, pixels_to_images
from cascade.pipelines.few_steps import own_choice
from cascade.pipelines.finite import check_not_black
from cascade.pipelines.given import Given, read_given
from cascade.pipelines.loaded import GPU_BATCH_SIZE, LoadedCascade
from cascade.pipelines.memory import PictureWork
from cascade.pipelines.picture_input import PictureInput
from cascade.pipelines.placement import format_said
from cascade.pipelines.plan import Plan, Request, Settings, make_plan
from cascade.pipelines.prompts import PromptStates, batches_of
from cascade.pipelines.results import (
    CascadeOutput,
    CascadePicture,
    Reconstruction,
    collect,
    describe,
    gather,
    join,
)
from cascade.pipelines.sampling import sample_stage_b, sample_stage_c
from cascade.pipelines.watch import Clock, OnPreview, Watch
from cascade.rng import PictureNoise


class CascadePipeline(LoadedCascade):
    """A loaded cascade; call it with a prompt.

    On a CPU pictures run through the networks one at a time, so that a picture of a batch equals
    the same seed alone bit by bit: matrix products of another batch size round differently. On
    GPUs they run in batches of four and may differ in the last bits; ``batch_size=1`` prevents it.
    """

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
        guidance_interval: tuple[float, float] | None = None,
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
            guidance_interval: Diffusion times between which Stage C is guided.
            sampler: "ddpm", "ddim" or "dpmpp_2m", for both stages; of networks for few steps
                "lcm" alone.
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
        settings = Settings(
            negative_prompt=negative_prompt,
            seed=seed,
            seeds=seeds,
            num_images=num_images,
            steps_c=steps_c,
            steps_b=steps_b,
            guidance_c=guidance_c,
            guidance_b=guidance_b,
            guidance_interval=guidance_interval,
            sampler=sampler,
            width=width,
            height=height,
        )
        return self.make(
            make_plan(self.spec, prompt, settings),
            batch_size=batch_size,
            progress=progress,
            on_preview=on_preview,
            preview_every=preview_every,
        )

    def variation(
        self, image: ImageLike, prompt: str | Sequence[str] = "", settings: Settings | None = None
    ) -> CascadeOutput:
        """Make pictures like this one: Stage C is told its CLIP embedding, and the prompt if any.

        Args:
            image: The picture, here and below, or its file.
            prompt: One prompt or several.
            settings: Everything else, here and below: :class:`cascade.pipelines.plan.Settings`.

        Raises:
            UserError: If the model takes no picture, and as a call does.
        """
        given = PictureInput(as_image(image), "variation")
        return self._from_picture(given, prompt, settings)

    def image_to_image(
        self,
        image: ImageLike,
        prompt: str | Sequence[str],
        strength: float | None = None,
        settings: Settings | None = None,
    ) -> CascadeOutput:
        """Change a picture by a prompt: noise its Stage C latents and denoise them.

        Args:
            image: The picture.
            prompt: One prompt or several.
            strength: Diffusion time in (0, 1] from which it is drawn anew; None is 0.8.
            settings: Everything else.

        Raises:
            UserError: If the model has no compressor, and as a call does.
        """
        given = PictureInput(as_image(image), "img2img", None, strength)
        return self._from_picture(given, prompt, settings)

    def inpaint(
        self,
        image: ImageLike,
        mask: ImageLike,
        prompt: str | Sequence[str],
        strength: float | None = None,
        settings: Settings | None = None,
    ) -> CascadeOutput:
        """Draw a part of a picture anew; all other pixels come out as they were.

        Args:
            image: The picture.
            mask: As large as the picture: white is drawn anew.
            prompt: One prompt or several.
            strength: See ``image_to_image``; None is 1.
            settings: Everything else.

        Raises:
            UserError: If the model has no compressor, and as a call does.
        """
        given = PictureInput(as_image(image), "inpaint", as_image(mask), strength)
        return self._from_picture(given, prompt, settings)

    def outpaint(
        self, image: ImageLike, prompt: str | Sequence[str], settings: Settings
    ) -> CascadeOutput:
        """Draw what is around a picture, which lies in the middle and comes out as it was.

        Args:
            image: The picture.
            prompt: One prompt or several, of the whole.
            settings: Everything else; its width and height are those of the whole.

        Raises:
            UserError: If the whole is not larger than the picture, and as a call does.
        """
        given = PictureInput(as_image(image), "outpaint")
        return self._from_picture(given, prompt, settings)

    def _from_picture(
        self, picture: PictureInput, prompt: str | Sequence[str], settings: Settings | None
    ) -> CascadeOutput:
        return self.make(make_plan(self.spec, prompt, settings, picture=picture))

    def make(
        self,
        plan: Plan,
        *,
        batch_size: int | None = None,
        progress: bool | None = None,
        on_preview: OnPreview | None = None,
        preview_every: int = 4,
    ) -> CascadeOutput:
        """Make all pictures of a plan; the arguments and errors are those of a call."""
        pictures = self.run(
            plan,
            batch_size=batch_size,
            progress=progress,
            on_preview=on_preview,
            preview_every=preview_every,
        )
        finished = gather(pictures, len(plan.requests))
        return collect(finished, plan.notices)

    def run(
        self,
        plan: Plan,
        *,
        batch_size: int | None = None,
        progress: bool | None = None,
        on_preview: OnPreview | None = None,
        preview_every: int = 4,
    ) -> Iterator[CascadePicture]:
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
            if plan.picture is not None and plan.picture.mode == "reconstruct":
                raise UserError("no previews: Stage C does not run in a reconstruction")
            _ = self.previewer  # a model without one: now, not after Stage C's first steps
        memory = self.arrange(plan, batch_size=batch_size)
        if batch_size is None:
            batch_size = memory.batch_size or (1 if self.device.type == "cpu" else GPU_BATCH_SIZE)
        prompts = [request.prompt for request in plan.requests]
        states = self.prompt_states([*prompts, plan.negative_prompt])
        given = read_given(self, plan)
        for batch in batches_of(plan, states, batch_size):
            watch = Watch(batch, len(plan.requests), progress, on_preview, preview_every)
            yield from self._make_batch(plan, states, given, watch)

    def reconstruct(
        self,
        pixels: Tensor,
        *,
        through: Literal["a", "ab"] = "ab",
        seeds: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Reconstruction:
        """Send pictures down the cascade and up again; all run together, or as many as fit.

        Args:
            pixels: ``(B, 3, H, W)`` in [0, 1], both sides multiples of the model's.
            through: "a" is Stage A alone; "ab" is the compressor, Stage B sampling, and Stage A.
            seeds: One for each picture's Stage B noise; None is 0 for all.
            prompts: What Stage B is told beside the latents; None is the null prompt.

        Raises:
            UserError: If shapes, seeds or prompts do not fit, or the memory does not do.
        """
        if through not in ("a", "ab"):
            raise UserError(f"through {through!r}: 'a' or 'ab'")
        self.check_pixels(pixels)
        count, (height, width) = len(pixels), pixels.shape[-2:]
        if height % self.spec.size_multiple or width % self.spec.size_multiple:
            raise UserError(
                f"pixels of shape {tuple(pixels.shape)}: (B, 3, H, W) with sides that are "
                f"multiples of {self.spec.size_multiple} are needed"
            )
        self.use(own_choice(self.spec))
        seeds = [0] * count if seeds is None else list(seeds)
        prompts = [""] * count if prompts is None else list(prompts)
        if len(seeds) != count or len(prompts) != count:
            raise UserError(f"{count} pictures, {len(seeds)} seeds and {len(prompts)} prompts")
        together = self._arrange_reading(prompts, (height, width), through) or max(count, 1)
        states = self.prompt_states([*prompts, ""])[1]
        made = []
        for start in range(0, max(count, 1), together):
            part = slice(start, start + together)
            if through == "a":
                made.append(self._through_stage_a(pixels[part]))
            else:
                made.append(self._through_stage_b(pixels[part], states, prompts[part], seeds[part]))
        return join(made)

    def _arrange_reading(
        self, prompts: Sequence[str], size: tuple[int, int], through: str
    ) -> int | None:
        """Place the networks for a reconstruction; return how many run together, None: all."""
        if not self.memory.has_budget or not prompts:
            return None
        work = PictureWork(compressed=size, idle=frozenset({"stage_c"}))
        if through == "a":
            idle = frozenset({"text", "text_b", "stage_c", "stage_b"})
            work = PictureWork(encoded=size, idle=idle)
        requests = tuple(Request(prompt, 0) for prompt in prompts)
        spec = self.spec
        stage_b = spec.sampling("stage_b", few="stage_b" in self.few)
        plan = Plan(requests, "", size[1], size[0], spec.stage_c, stage_b, few=self.few)
        return self._arrange(plan, None, len(prompts), work).batch_size

    @torch.inference_mode()
    def _through_stage_a(self, pixels: Tensor) -> Reconstruction:
        latents = self.encode_stage_a(pixels)
        return Reconstruction(self.decode(latents).cpu(), None, latents.cpu())

    @torch.inference_mode()
    def _through_stage_b(
        self, pixels: Tensor, states: PromptStates, prompts: Sequence[str], seeds: Sequence[int]
    ) -> Reconstruction:
        stage_c_latents = self.encode_picture(pixels)
        prompted_b = states.pair(prompts, "")
        height, width = pixels.shape[-2:]
        with self.memory.on("stage_b"):
            latents = sample_stage_b(
                self.stage_b,
                self.spec.sampling("stage_b", few="stage_b" in self.few),
                self.told(stage_c_latents),
                prompted_b,
                PictureNoise(seeds, "stage_b"),
                self.latent_shape(height, width, stage_c_latents),
                graphs=self.graphs,
            )
        return Reconstruction(self.decode(latents).cpu(), stage_c_latents.cpu(), latents.cpu())

    @torch.inference_mode()
    def _make_batch(
        self, plan: Plan, states: tuple[PromptStates, PromptStates], given: Given, watch: Watch
    ) -> list[CascadePicture]:
        """Run one batch through all stages."""
        requests = [plan.requests[index] for index in watch.batch]
        seeds = [request.seed for request in requests]
        clock = Clock(self.device)

        with clock("text"):
            prompts = [request.prompt for request in requests]
            prompted, prompted_b = (one.pair(prompts, plan.negative_prompt) for one in states)

        on = self.memory.on
        if given.reconstructed is not None:
            stage_c_latents = given.reconstructed.expand(len(requests), -1, -1, -1)
        else:
            sampling = plan.stage_c_run
            with clock("stage_c"), on("stage_c"), watch.stage("Stage C", sampling.steps) as count:

                def on_step(info: StepInfo) -> None:
                    count(info)
                    if watch.wants_preview(info):
                        watch.show(info, self.preview(info.x0_hat))

                stage_c_latents = sample_stage_c(
                    self.stage_c,
                    sampling,
                    prompted,
                    PictureNoise(seeds, "stage_c"),
                    self.spec.stage_c_size((plan.height, plan.width)),
                    start=given.stage_c,
                    shown=given.shown,
                    graphs=self.graphs,
                    on_step=on_step,
                )

        with clock("stage_b"), on("stage_b"), watch.stage("Stage B", plan.stage_b.steps) as count:
            stage_b_latents = sample_stage_b(
                self.stage_b,
                plan.stage_b,
                self.told(stage_c_latents),
                prompted_b,
                PictureNoise(seeds, "stage_b"),
                self.latent_shape(plan.height, plan.width, stage_c_latents),
                start=given.stage_b,
                graphs=self.graphs,
                on_step=count,
            )

        with clock("stage_a"):
            pixels = given.pasted(self.decode(stage_b_latents).cpu())
        check_not_black(pixels, self.dtypes.stage_a)
        seconds = {name: value / len(requests) for name, value in clock.seconds.items()}
        return [
            CascadePicture(
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
        weights, dtypes = self.weights_hash, format_said(self.dtypes, self.int8)
        return describe(plan, index, model=self.spec.name, weights=weights, dtype=dtypes)
