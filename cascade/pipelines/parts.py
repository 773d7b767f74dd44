"""The loaded networks of one cascade, wherever they came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import nn

from cascade.checkpoints.files import file_hash, load_network, read_metadata
from cascade.checkpoints.hub import ModelFiles, refuse_lite
from cascade.errors import UserError
from cascade.pipelines.placement import Dtypes, refuse_overflow
from cascade.pipelines.spec import (
    FAST_DECODER_FILE,
    SPEC_FILE,
    CascadeSpec,
    Stage,
    load_spec,
    model_hash,
)
from cascade.pipelines.trained import check_as_trained, trained_stage
from cascade.text.encoder import TextEncoder
from cascade.text.picture_encoder import PictureEncoder, own_picture_encoder
from stages.previewer import Previewer
from stages.semantic_compressor import SemanticCompressor
from stages.stage_a import StageA
from stages.stage_a_fast import FastDecodedStageA, StageAFast
from stages.stage_b import StageB
from stages.stage_b_v2 import StageBV2
from stages.stage_c import StageC
from stages.stage_c_v2 import StageCV2

N = TypeVar("N", bound=nn.Module)
Extra = Literal["compressor", "previewer", "image_encoder"]
Dialect = Literal["official", "diffusers"]


@dataclass
class CascadeParts:
    """What a pipeline runs."""

    stage_a: StageA
    stage_b: StageB | StageBV2
    stage_c: StageC | StageCV2
    text: TextEncoder
    """Stage C's text encoder, and Stage B's unless it has one of its own."""
    text_b: TextEncoder | None = None
    """Stage B's own text encoder (v2)."""
    extras: dict[str, Callable[[torch.device], Any]] = field(default_factory=dict)
    """Loaders, to a device, of what only some calls need: "compressor", "previewer",
    "image_encoder"."""
    others: Callable[[Stage, bool, torch.device], Any] | None = None
    """Loads a stage's network for few steps (True) or its plain one (False), to a device, where a
    model has both."""

    def extra(self, name: Extra, where: str, device: torch.device) -> Any:
        """Load a part that only some calls need to a device.

        Raises:
            UserError: If the model has none.
        """
        if name not in self.extras:
            what = name.replace("_", " ")
            raise UserError(f"{where}: this model has no {what}; its files came without one")
        return self.extras[name](device)


class Source(Protocol):
    """A model on this disk: its settings at once, its networks when asked."""

    folder: Path
    spec: CascadeSpec

    def load(
        self, device: torch.device, dtypes: Dtypes, few: frozenset[Stage] = frozenset()
    ) -> CascadeParts:
        """Load the networks; of the stages ``few`` those for few steps."""
        ...

    def weights_hash(self) -> str:
        """Return 12 hex digits that tell these weights from others."""
        ...

    def metadata(self, name: str) -> dict[str, str]:
        """Return the metadata of a network's file; empty where it has none."""
        ...


class OwnFolder:
    """A model folder that was written here: ``model.json``, the stages' files, ``text/``."""

    def __init__(self, folder: Path, *, fast_decoder: bool = False) -> None:
        """Read ``model.json``.

        Args:
            folder: Of the model.
            fast_decoder: Decode with ``stage_a_fast.safetensors`` instead of Stage A's decoder.

        Raises:
            UserError: If it is missing or not valid, or has no fast decoder.
        """
        self.folder = folder
        self.spec = load_spec(folder)
        self.fast_decoder = folder / FAST_DECODER_FILE if fast_decoder else None
        if self.fast_decoder is not None and not self.fast_decoder.is_file():
            raise UserError(
                f"{self.fast_decoder}: not there: this model has no fast decoder; train one with "
                "python -m train stage_a_decoder, or leave --fast-decoder out"
            )

    def load(
        self, device: torch.device, dtypes: Dtypes, few: frozenset[Stage] = frozenset()
    ) -> CascadeParts:
        """Load the stages; the compressor and the previewer wait until they are needed.

        Args:
            device: Where to.
            dtypes: Number formats.
            few: Stages whose network for few steps is loaded in place of the plain one.

        Raises:
            UserError: For float16 in a converted Stage C that is known to overflow, or a stage that
                was trained otherwise than ``model.json`` says that it is sampled.
        """
        refuse_overflow(self.spec, dtypes, self.folder)
        v2 = self.spec.generation == "v2"

        def load(name: str, network: type[N], to: torch.device = device) -> N:
            path = self.folder / f"{name}.safetensors"
            dtype = dtypes.of(name.removesuffix("_few"))
            return load_network(path, expect=network, device=to, dtype=dtype)

        def stage(name: Stage, is_few: bool, to: torch.device = device) -> Any:
            kinds: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
                "stage_b": (StageB, StageBV2),
                "stage_c": (StageC, StageCV2),
            }
            file = f"{name}_few" if is_few else name
            network = load(file, kinds[name][v2], to)
            trained = trained_stage(self.metadata(file), str(self.folder / f"{file}.safetensors"))
            where = f"{self.folder / SPEC_FILE}: {file}."
            sampling = self.spec.sampling(name, few=is_few)
            check_as_trained(sampling, trained, str(self.folder / f"{file}.safetensors"), where)
            return network

        text = TextEncoder.from_folder(self.folder / "text", self.spec.text, device=device)
        text_b = None
        if self.spec.text_b is not None:
            folder = self.folder / "text_b"
            text_b = TextEncoder.from_folder(folder, self.spec.text_b, device=device)
        extras: dict[str, Callable[[torch.device], Any]] = {
            name: partial(load, name, network)
            for name, network in (("compressor", SemanticCompressor), ("previewer", Previewer))
            if (self.folder / f"{name}.safetensors").exists()
        }
        tower = own_picture_encoder(self.folder)
        if tower is not None:
            extras["image_encoder"] = partial(PictureEncoder.from_folder, tower)
        return CascadeParts(
            stage_c=stage("stage_c", "stage_c" in few),
            stage_b=stage("stage_b", "stage_b" in few),
            stage_a=self._stage_a(load("stage_a", StageA), device, dtypes),
            text=text,
            text_b=text_b,
            extras=extras,
            others=stage,
        )

    def _stage_a(self, stage_a: StageA, device: torch.device, dtypes: Dtypes) -> StageA:
        """Give Stage A its fast decoder, if that was asked for."""
        if self.fast_decoder is None:
            return stage_a
        dtype = dtypes.of("stage_a")
        fast = load_network(self.fast_decoder, expect=StageAFast, device=device, dtype=dtype)
        try:
            return FastDecodedStageA.of(stage_a, fast)
        except ValueError as error:
            raise UserError(f"{self.fast_decoder}: {error}") from error

    def weights_hash(self) -> str:
        """Hash all weights and settings that are used."""
        whole = model_hash(self.folder)
        return whole if self.fast_decoder is None else f"{whole}+{file_hash(self.fast_decoder)}"

    def metadata(self, name: str) -> dict[str, str]:
        """Return the metadata of a network's file."""
        return read_metadata(self.folder / f"{name}.safetensors")


def open_source(
    model: str | Path | ModelFiles,
    *,
    dialect: Dialect = "official",
    lite: bool = False,
    fast_decoder: bool = False,
) -> Source:
    """Find out what a model is: one of ours, or published files in any layout.

    Args:
        model: Its folder, or what ``resolve`` found of it.
        dialect: For published weights: sampled as their authors do, or as diffusers does.
        lite: For published weights in several sizes: take the smaller ones.
        fast_decoder: For a model folder of ours: decode with its small decoder.

    Raises:
        UserError: If no cascade is there, or it has no fast decoder.
    """
    files = model if isinstance(model, ModelFiles) else ModelFiles((Path(model),))
    if len(files.folders) == 1 and (files.folders[0] / SPEC_FILE).is_file():
        refuse_lite(replace(files, lite=files.lite or lite), "a model folder of ours")
        return OwnFolder(files.folders[0], fast_decoder=fast_decoder)
    if fast_decoder:
        raise UserError(
            f"{files.folders[0]}: published files have no fast decoder; leave --fast-decoder out"
        )
    from cascade.pipelines.published import PublishedFiles

    return PublishedFiles(replace(files, lite=files.lite or lite), dialect)
