"""A cascade's networks on their devices: loading, placement, and the single steps between stages.

What makes whole pictures of these steps is :class:`cascade.pipelines.cascade.CascadePipeline`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cascade.checkpoints.hub import resolve
from cascade.control import control_kind
from cascade.cuda_graphs import CudaGraphs
from cascade.errors import UserError
from cascade.pipelines.control_network import control_config, small_size
from cascade.pipelines.few_steps import check_told, own_choice
from cascade.pipelines.finite import check_finite
from cascade.pipelines.fit import check_fit
from cascade.pipelines.memory import NO_PICTURE, PictureWork
from cascade.pipelines.memory_plan import MemoryPlan
from cascade.pipelines.offload import CascadeMemory, check_request
from cascade.pipelines.parts import Dialect, Extra, Source, open_source
from cascade.pipelines.placement import (
    DtypeChoice,
    pick_device,
    pick_dtypes,
    round_weights,
)
from cascade.pipelines.plan import Plan
from cascade.pipelines.prompts import PromptStates
from cascade.pipelines.spec import Stage
from cascade.pipelines.tiles import decode_pixels, encode_latents
from cascade.text.picture_encoder import PictureEncoder, centre_square
from stages.previewer import Previewer
from stages.semantic_compressor import SemanticCompressor

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11

GPU_BATCH_SIZE = 4
"""Pictures that run together on a GPU unless the caller says otherwise."""


class LoadedCascade:
    """The networks of one cascade, and what passes between them."""

    def __init__(
        self,
        folder: str | Path | Source,
        *,
        device: str = "auto",
        dtype: DtypeChoice = "auto",
        offload: str | None = None,
        vram: float | None = None,
        few: frozenset[Stage] | None = None,
        int8: bool = False,
    ) -> None:
        """Load a model folder; nothing is downloaded.

        Args:
            folder: A folder of ours or of published weights, or what ``open_source`` made of one.
            device: "auto", "cpu", "cuda", "cuda:1", "mps".
            dtype: Number format of the stages: "auto", "float32", "bfloat16", "float16", or one
                for each: see ``pick_dtypes``.
            offload: See ``place``.
            vram: See ``place``.
            few: Stages whose network for few steps is loaded first, where a model has two; None:
                those that run when nothing is asked for. Each run loads what it needs.
            int8: Keep the linear layers of Stage C and Stage B in int8; see ``round_weights``.

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
        self.few = own_choice(self.spec) if few is None else few
        self._parts = self._source.load(home, self.dtypes, self.few)
        self.int8 = int8
        if int8:
            round_weights(self._parts.stage_c, "Stage C")
            round_weights(self._parts.stage_b, "Stage B")
        self.text_encoder = self._parts.text
        self.text_encoder_b = self._parts.text_b or self._parts.text
        self.stage_c = self._parts.stage_c
        self.stage_b = self._parts.stage_b
        self.stage_a = self._parts.stage_a
        self._check_fit()
        cell = self.stage_a.downscale * self.stage_b.config.latent_multiple
        if self.spec.size_multiple % cell:
            raise UserError(
                f"{self.folder}: the model's size_multiple is {self.spec.size_multiple}, but "
                f"Stage A and Stage B together need multiples of {cell} pixels"
            )

        self.graphs: CudaGraphs | None = None  # see ``use_cuda_graphs``
        self.memory = CascadeMemory(self._parts, self.device, self.dtypes)
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
        int8: bool = False,
    ) -> Self:
        """Load a model folder; the network is never touched."""
        return cls(folder, device=device, dtype=dtype, offload=offload, vram=vram, int8=int8)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: str = "auto",
        dtype: DtypeChoice = "auto",
        offload: str | None = None,
        vram: float | None = None,
        int8: bool = False,
        revision: str | None = None,
        variant: str | None = None,
        dialect: Dialect = "official",
        lite: bool = False,
    ) -> Self:
        """Load a model folder, or fetch ``organisation/name`` from the hub and load that.

        Args:
            model: A folder, or ``organisation/name[:lite][@revision]`` on the hub.
            device: See the constructor.
            dtype: See the constructor.
            offload: See ``place``.
            vram: See ``place``.
            int8: See the constructor.
            revision: A branch, tag or commit on the hub; see ``resolve`` for two repositories.
            variant: The mark of a set of weights, such as "bf16"; None: the unmarked one.
            dialect: For published weights: sampled as their authors do, or as diffusers does.
            lite: For published weights in several sizes: take the smaller ones.

        Raises:
            UserError: If it is neither, cannot be fetched, or does not fit.
        """
        files = resolve(model, revision=revision, variant=variant, lite=lite)
        source = open_source(files, dialect=dialect)
        return cls(source, device=device, dtype=dtype, offload=offload, vram=vram, int8=int8)

    def use(self, few: frozenset[Stage]) -> None:
        """Have the networks for few steps of these stages, and the plain ones of the others.

        Only one network of a stage is loaded at a time.

        Raises:
            UserError: A file is missing or does not fit.
        """
        stages: tuple[Stage, ...] = ("stage_c", "stage_b")
        for stage in stages:
            if (stage in few) == (stage in self.few):
                continue
            assert self._parts.others is not None, "only a model with both asks for another"
            network = self._parts.others(stage, stage in few, self.memory.home(stage))
            if self.int8:
                round_weights(network, stage)
            self.memory.replace(stage, network)
            setattr(self._parts, stage, network)
            setattr(self, stage, network)
            self.few = self.few ^ {stage}
            self._check_fit()

    def _check_fit(self) -> None:
        """Check that the loaded networks belong together and are what ``model.json`` says."""
        check_fit(self.text_encoder, self.stage_c, self.stage_b, self.stage_a, str(self.folder))
        both: tuple[tuple[str, Stage, Any], ...] = (
            ("Stage C", "stage_c", self.stage_c),
            ("Stage B", "stage_b", self.stage_b),
        )
        for title, stage, network in both:
            sampling = self.spec.sampling(stage, few=stage in self.few)
            told = getattr(network.config, "time_conds", ())
            check_told(f"{self.folder}: {title}", told, sampling)

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
        self.use(plan.few)
        picture = self._picture_work(plan) if self.memory.has_budget else NO_PICTURE
        return self._arrange(plan, batch_size, GPU_BATCH_SIZE, picture)

    def _arrange(
        self, plan: Plan, batch_size: int | None, most: int, picture: PictureWork
    ) -> MemoryPlan:
        size = self.spec.stage_c_size((plan.height, plan.width))
        shape = self.latent_shape(plan.height, plan.width, torch.empty(0, *size))
        if picture.compressed is not None:
            _ = self.compressor  # what it takes is computed of the network itself
        if picture.embedded is not None:
            self._fitting_image_encoder()
        return self.memory.arrange(plan, size, shape, batch_size, most, picture)

    def _picture_work(self, plan: Plan) -> PictureWork:
        """Return what is read of a plan's picture and control, for the plan of memory."""
        task, whole = plan.picture, (plan.height, plan.width)
        work = NO_PICTURE
        if task is not None and task.mode == "variation":
            side = min(task.pixels.shape[-2:])
            work = PictureWork(embedded=(side, side))
        elif task is not None and task.mode == "reconstruct":
            work = PictureWork(compressed=whole, idle=frozenset({"stage_c"}))
        elif task is not None and task.mask is None:
            work = PictureWork(compressed=whole, starts=frozenset({"stage_c"}))
        elif task is not None:
            starts = frozenset({"stage_c", "stage_b"})
            work = PictureWork(compressed=whole, encoded=whole, starts=starts)
        if plan.control is None:
            return work
        config = control_config(plan.control, self.stage_c)
        if control_kind(config) == "super_resolution" and work.compressed is None:
            work = replace(work, compressed=small_size(*whole))
        return replace(work, control=config, controlled=whole)

    @cached_property
    def compressor(self) -> SemanticCompressor:
        """The semantic compressor, loaded when a picture is first encoded."""
        network: SemanticCompressor = self._extra("compressor")
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
        network: Previewer = self._extra("previewer")
        self.memory.add("previewer", network)
        return network

    @cached_property
    def image_encoder(self) -> PictureEncoder:
        """CLIP's picture tower, loaded when a picture is first varied."""
        network: PictureEncoder = self._extra("image_encoder")
        self.memory.add("image_encoder", network)
        return network

    def _extra(self, name: Extra) -> Any:
        return self._parts.extra(name, str(self.folder), self.memory.home(name))

    @cached_property
    def weights_hash(self) -> str:
        """Hash over the model's files, as stored in pictures."""
        return self._source.weights_hash()

    def encode_picture(self, pixels: Tensor) -> Tensor:
        """Compress pictures into Stage C latents.

        Args:
            pixels: ``(B, 3, H, W)`` in [0, 1].

        Returns:
            ``(B, 16, h, w)`` float32 on the pipeline's device, ready for diffusion.
        """
        self.check_pixels(pixels)
        compressor = self.compressor
        with torch.inference_mode(), self.memory.on("compressor"):
            latents = torch.cat(
                [compressor.encode(one.to(self.device)).float() for one in self._read(pixels)]
            )
        check_finite(latents, "the semantic compressor", self.dtypes.of("compressor"))
        return latents

    def encode_stage_a(self, pixels: Tensor) -> Tensor:
        """Return Stage A's latents of pictures, float32."""
        dtype = self.dtypes.stage_a
        with self.memory.on("stage_a"):
            tile = self.memory.plan.encoder_tile
            return torch.cat(
                [
                    encode_latents(self.stage_a, one, self.device, dtype, tile)
                    for one in self._read(pixels)
                ]
            )

    def _read(self, pixels: Tensor) -> Sequence[Tensor]:
        """Return pictures as they are read: together, or one at a time as a budget counts them."""
        one_by_one = self.memory.plan.one_by_one and len(pixels)
        return pixels.split(1) if one_by_one else (pixels,)

    def embed_picture(self, pixels: Tensor) -> Tensor:
        """Return the CLIP embedding ``(1, 1, E)`` of a picture."""
        encoder = self._fitting_image_encoder()
        with self.memory.on("image_encoder"):
            embeds = encoder(centre_square(pixels))[:, None]
        check_finite(embeds, "the image encoder", embeds.dtype)
        return embeds

    def _fitting_image_encoder(self) -> PictureEncoder:
        """Return the picture tower, if Stage C takes its embeddings."""
        channels = getattr(self.stage_c.config, "image_channels", None)
        if channels is None:
            raise UserError(f"{self.folder}: this model's Stage C is told nothing of pictures")
        encoder = self.image_encoder
        if encoder.channels != channels:
            raise UserError(
                f"{self.folder}: its Stage C takes embeddings of pictures with {channels} values, "
                f"but its image encoder makes {encoder.channels}"
            )
        return encoder

    def check_pixels(self, pixels: Tensor) -> None:
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

    def prompt_states(self, prompts: Sequence[str] = ()) -> tuple[PromptStates, PromptStates]:
        """Return what Stage C and Stage B read of prompts; the same if they share an encoder.

        An encoder that leaves the device again encodes ``prompts``, the run's, at its first visit.
        """
        states = self.memory.prompt_states("text", self.text_encoder, prompts)
        if self.text_encoder_b is self.text_encoder:
            return states, states
        return states, self.memory.prompt_states("text_b", self.text_encoder_b, prompts)

    def told(self, stage_c_latents: Tensor) -> Tensor:
        """Return Stage C's latents in the scale that Stage B was trained on."""
        return stage_c_latents * self.spec.stage_c_scale - self.spec.stage_c_shift

    def latent_shape(
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

    def decode(self, stage_b_latents: Tensor) -> Tensor:
        """Turn Stage B latents into pixels ``(B, 3, H, W)``, float32 in [0, 1]."""
        with self.memory.on("stage_a"):
            return decode_pixels(
                self.stage_a, stage_b_latents, self.dtypes.stage_a, self.memory.plan.tile
            )

    def preview(self, x0_hat: Tensor) -> Tensor:
        """Turn Stage C latents into rough pixels ``(B, 3, u h, u w)``, about [0, 1]."""
        dtype = self.dtypes.of("previewer")
        with self.memory.on("previewer"):
            pixels: Tensor = self.previewer(x0_hat.to(dtype)).float()
        check_finite(pixels, "the previewer", dtype)
        return pixels
