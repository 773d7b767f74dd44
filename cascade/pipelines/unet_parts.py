"""A U-Net's pipeline on this disk: a folder of diffusers, or a single file; told by its content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from cascade.adapters.lora_names import Part
from cascade.checkpoints.detect import Kind
from cascade.checkpoints.found import told_by
from cascade.checkpoints.hub import ModelFiles, refuse_lite
from cascade.checkpoints.load import build, identify
from cascade.checkpoints.readers import (
    is_entry,
    open_weights,
    read_json,
    weights_in,
)
from cascade.checkpoints.said import said_in
from cascade.config import from_dict, to_dict
from cascade.errors import UserError
from cascade.pipelines.placement import UNetDtypes
from cascade.pipelines.spec import SPEC_FILE, name_of
from cascade.pipelines.trained import check_as_trained, check_scheduler
from cascade.pipelines.unet_files import (
    INDEX_FILE,
    SCHEDULER_FILE,
    SPEC_KEY,
    UNetPart,
    hash_of_parts,
    named_file,
    open_one,
    other_unet,
    refuse_lost_settings,
    single_files,
    text_of_single,
    written_in,
)
from cascade.pipelines.unet_lora import (
    LoraChoice,
    OpenedLora,
    advice_of,
    by_its_name,
    merge_loras,
)
from cascade.pipelines.unet_published import advice_for, sampling_of, with_lora
from cascade.pipelines.unet_spec import (
    UNET_DIFFUSION_KEY,
    UNET_SPEC_FILE,
    UNetSampling,
    UNetSpec,
    load_unet_spec,
)
from cascade.text.encoder import TextConfig, TextEncoder
from stages.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_SD_TEXT = TextConfig(hidden="post_norm", masks_padding=False)
_SDXL_TEXT = TextConfig(hidden="penultimate", masks_padding=False)


@dataclass
class UNetParts:
    """What a pipeline runs."""

    unet: UNet
    autoencoder: AutoencoderKL
    text: TextEncoder
    """The one text encoder of SD, or SDXL's first. A U-Net of SDXL's kind may have one alone, which
    then gives the pooled state as well."""
    text_2: TextEncoder | None = None
    """SDXL's second, whose pooled state the U-Net reads as well."""

    @property
    def updatable(self) -> dict[Part, nn.Module]:
        """The networks that a LoRA may update."""
        networks: dict[Part, nn.Module] = {"unet": self.unet, "text_encoder": self.text.model}
        return networks | ({} if self.text_2 is None else {"text_encoder_2": self.text_2.model})


def is_unet(files: ModelFiles) -> bool:
    """Tell whether a model is a U-Net's pipeline; only names and headers are read.

    Raises:
        UserError: If a file that has to be looked into is broken.
    """
    folder = files.folders[0]
    if len(files.folders) > 1 or (folder / SPEC_FILE).is_file():
        return False
    if named_file(files) is not None or (folder / UNET_SPEC_FILE).is_file():
        return True
    if (folder / INDEX_FILE).is_file():
        return str(read_json(folder / INDEX_FILE).get("_class_name")).startswith("StableDiffusion")
    if (folder / "unet").is_dir() and (folder / "vae").is_dir():
        return True  # one of ours for Cascade alone, whose settings may be missing
    return (folder / "unet" / "config.json").is_file() or bool(single_files(folder))


def open_unet_source(
    files: ModelFiles | str | Path,
    unet: Path | None = None,
    loras: Sequence[LoraChoice] = (),
) -> UNetSource:
    """Find the parts of a U-Net's pipeline; only headers are read.

    Args:
        files: What ``resolve`` found, a folder, or a single file.
        unet: A U-Net to run in place of the model's own: its file, its folder, or its model's.
        loras: LoRAs to merge into its networks when they are loaded.

    Raises:
        UserError: If a part is missing, or does not belong to the others.
    """
    if not isinstance(files, ModelFiles):
        path = Path(files)
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; check the path")
        files = (
            ModelFiles((path,))
            if path.is_dir()
            else ModelFiles((path.parent,), False, frozenset({path}))
        )
    refuse_lite(files, "a U-Net")
    single = named_file(files)
    folder = files.folders[0]
    if single is None and not (folder / "unet").is_dir():
        found = single_files(folder)
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:5])
            raise UserError(f"{folder}: several models in it; name one of its files: {names}")
        if not found:
            raise UserError(f"{folder}: no U-Net in it, neither diffusers' folders nor a file")
        single = found[0]
    return UNetSource(folder, single, files, unet, loras)


class UNetSource:
    """A model on this disk: its settings at once, its networks when asked."""

    def __init__(
        self,
        folder: Path,
        single: Path | None,
        files: ModelFiles,
        unet: Path | None,
        loras: Sequence[LoraChoice],
    ) -> None:
        """Look through the files; see ``open_unet_source``."""
        self.folder = folder
        self.where = str(single or folder)
        self._files = files.files
        self._single = single
        self.loras = [OpenedLora(one) for one in loras]
        self._parts = self._open_single(single) if single else self._open_folder()
        self._written = self._written_spec()  # the model's, whichever U-Net runs
        if single is None and self._written is None and not self._index:
            refuse_lost_settings(folder, self._parts.get("unet"))
        if unet is not None:
            self._parts["unet"] = other_unet(unet)
        for name in ("unet", "autoencoder"):
            if name not in self._parts:
                raise UserError(f"{self.where}: no {name} in it, which a picture needs")
        config = self.unet_config
        if config.in_channels != config.out_channels:
            raise UserError(
                f"{self._parts['unet'].opened.where}: a U-Net of {config.in_channels} channels "
                "in, for inpainting or editing, which is not here"
            )
        self.is_sdxl = config.text_pooled_channels is not None
        try:
            self.spec = self._as_trained(self._make_spec(unet), is_own=unet is None)
        except UserError:
            raise
        except ValueError as error:  # sizes of which no settings can be made
            raise UserError(f"{self.where}: {error}") from error

    @property
    def unet_config(self) -> UNetConfig:
        """Sizes of the U-Net."""
        return cast(UNetConfig, self._parts["unet"].published.config)

    @property
    def autoencoder_config(self) -> AutoencoderKLConfig:
        """Sizes of the autoencoder."""
        return cast(AutoencoderKLConfig, self._parts["autoencoder"].published.config)

    def told(self) -> dict[str, dict[str, str]]:
        """Return what the files say of "unet" and "vae": how they were trained, whose student."""
        parts = {"unet": self._parts["unet"], "vae": self._parts["autoencoder"]}
        return {name: told_by(part.opened.metadata) for name, part in parts.items()}

    def load(self, device: torch.device, dtypes: UNetDtypes) -> UNetParts:
        """Load the networks.

        Raises:
            UserError: If one of them, or a LoRA, does not fit.
        """
        if not self.loras:
            return self._load(device, dtypes.unet, dtypes.autoencoder, dtypes.text)
        parts = self.load_as_stored()
        networks = parts.updatable
        formats = dict.fromkeys(networks, dtypes.text) | {"unet": dtypes.unet}
        merge_loras(self.loras, networks, formats, device)
        parts.autoencoder.to(device, dtypes.autoencoder)
        return parts

    def load_as_stored(self) -> UNetParts:
        """Load the networks without any LoRA, on the CPU and as they are in the files, mapped."""
        return self._load(torch.device("cpu"), None, None, None)

    def _load(
        self,
        device: torch.device,
        unet: torch.dtype | None,
        autoencoder: torch.dtype | None,
        text: torch.dtype | None,
    ) -> UNetParts:
        """Load the networks in number formats; None is a file's own."""

        def network(name: str, dtype: torch.dtype | None) -> nn.Module:
            part = self._parts[name]
            return build(part.opened, part.published, device=device, dtype=dtype)

        first = self._load_text(self._first_text, self.spec.text, device, text)
        second = None
        if self.spec.text_2 is not None:
            second = self._load_text("text_encoder_2", self.spec.text_2, device, text)
        return UNetParts(
            unet=cast(UNet, network("unet", unet)),
            autoencoder=cast(AutoencoderKL, network("autoencoder", autoencoder)),
            text=first,
            text_2=second,
        )

    @cached_property
    def weights_hash(self) -> str:
        """12 hex digits that tell this model from others: networks, text encoders and settings.

        Of large files a part is read. LoRAs are not in it: pictures name them beside it.
        """
        texts = [self._first_text] + ([] if self.spec.text_2 is None else ["text_encoder_2"])
        return hash_of_parts(self._parts, self.folder, texts, single=self._single is not None)

    @property
    def _first_text(self) -> str:
        """Name of the text encoder that is never missing.

        A single one of SDXL's kind lies where diffusers looks for the one that it pools.
        """
        there = "text_encoder" in self._parts or (self.folder / "text_encoder").is_dir()
        return "text_encoder" if there or not self.is_sdxl else "text_encoder_2"

    # Finding the parts

    def _open_single(self, path: Path) -> dict[str, UNetPart]:
        parts: dict[str, UNetPart] = {}
        for opened in open_weights(path):
            if opened.part is None:
                raise UserError(
                    f"{path}: one network alone, no whole model; name a model, and a U-Net with "
                    "--unet"
                )
            parts[opened.part] = UNetPart(opened, identify(opened), path)
        return parts

    def _open_folder(self) -> dict[str, UNetPart]:
        index = self._index
        name = index.get("_class_name")
        if name is not None and name not in _PIPELINES:
            raise UserError(f"{self.folder}: a {name}; {' and '.join(_PIPELINES)} are known")
        kinds: tuple[tuple[str, str, Kind], ...] = (
            ("unet", "unet", "unet"),
            ("autoencoder", "vae", "autoencoder_kl"),
        )
        return {
            part: open_one(self._entry(self.folder / inside), kind, f"{self.folder}: {inside}")
            for part, inside, kind in kinds
            if (self.folder / inside).is_dir()
        }

    def _entry(self, folder: Path) -> Path:
        """Return where a part's weights are opened: of several variants the chosen one."""
        chosen = [path for path in self._files or () if path.parent == folder and is_entry(path)]
        return min(chosen, key=lambda path: len(path.name)) if chosen else weights_in(folder)

    @cached_property
    def _index(self) -> dict[str, Any]:
        path = self.folder / INDEX_FILE
        return read_json(path) if path.is_file() and self._single is None else {}

    def _load_text(
        self, name: str, config: TextConfig, device: torch.device, dtype: torch.dtype | None
    ) -> TextEncoder:
        tokens = name.replace("text_encoder", "tokenizer")
        if self._single is None:
            return TextEncoder.from_folder(
                self.folder / name,
                config,
                tokenizer_folder=self.folder / tokens,
                device=device,
                dtype=dtype,
            )
        if name not in self._parts:
            raise UserError(f"{self.where}: no {name} in it, which a picture needs")
        return text_of_single(
            self._parts[name], self.folder, tokens, config, device, dtype, self._written is not None
        )

    # Settings

    def _make_spec(self, unet: Path | None) -> UNetSpec:
        written = self._written
        lora = advice_of(self.loras, self.unet_config)
        if written is not None and lora is not None:
            sampling = with_lora(written.sampling, lora)
            return replace(written, sampling=sampling, notices=(by_its_name(lora),))
        if written is not None and unet is None:
            return written
        name = " ".join(str(path) for path in (unet, self._single, self.folder) if path)
        path = self.folder / SCHEDULER_FILE
        scheduler = read_json(path) if path.is_file() and self._single is None else None
        advice = advice_for(self.unet_config, name, scheduler)
        sampling, notices = sampling_of(advice, self.is_sdxl, scheduler, str(path))
        if lora is not None:
            sampling, advice, notices = with_lora(sampling, lora), lora, [by_its_name(lora)]
        if written is not None:  # another U-Net in a model of ours
            return written if advice is None else replace(written, sampling=sampling)
        unsure = scheduler is None and self.unet_config.text_channels == 1024
        if unsure and not self.is_sdxl and "base" not in Path(self.where).name:
            # SD 2.x of 768 pixels and its base are the same network.
            sampling = replace(sampling, prediction="v")
            notices.append(
                "no tensor tells an SD 2.x that predicts v from one that predicts epsilon: it is "
                "taken for v, and for epsilon if its file's name has base in it"
            )
        cell = self.autoencoder_config.downscale
        size = self._parts["unet"].opened.declared.get("sample_size")
        default = 1024 if self.is_sdxl else 768 if sampling.prediction == "v" else 512
        image_size = size * cell if isinstance(size, int) else default
        if advice is not None and advice.image_size is not None:
            image_size = advice.image_size
        autoencoder = self._parts["autoencoder"].opened.declared
        return UNetSpec(
            name=name_of(self._single or self.folder),
            image_size=image_size,
            size_multiple=cell,
            min_size=min(64, image_size) // cell * cell,
            max_size=max(4096, image_size) // cell * cell,
            sampling=sampling,
            empty_negative="zeros" if self._zeros() else "encoded",
            autoencoder_in_float16=not (self.is_sdxl and autoencoder.get("force_upcast", True)),
            text=_SDXL_TEXT if self.is_sdxl else _SD_TEXT,
            text_2=_SDXL_TEXT if self.is_sdxl and self._first_text == "text_encoder" else None,
            told_sizes=self.is_sdxl,
            licence="" if advice is None else advice.licence,
            notices=tuple(notices),
        )

    def _as_trained(self, spec: UNetSpec, *, is_own: bool) -> UNetSpec:
        """Return the settings with what the U-Net's own file says of its training.

        The model's own U-Net must not contradict the model's settings, where it has some.
        """
        opened = self._parts["unet"].opened
        trained = said_in(opened.metadata, UNET_DIFFUSION_KEY, opened.where)
        if is_own and self._written is not None:
            # As they are written: a LoRA may have its own ways by now.
            settings = f"{self.folder / UNET_SPEC_FILE}: sampling."
            if self._single is not None:
                settings = f"{self._single}: {SPEC_KEY}.sampling."
            check_as_trained(self._written.sampling, trained, opened.where, settings)
        elif is_own and self._single is None and (self.folder / SCHEDULER_FILE).is_file():
            check_scheduler(self.folder / SCHEDULER_FILE, trained, opened.where)
        values = {**to_dict(spec.sampling), **trained}
        where = f"{opened.where} ({UNET_DIFFUSION_KEY})"
        return replace(spec, sampling=from_dict(UNetSampling, values, where))

    def _written_spec(self) -> UNetSpec | None:
        """Return the settings of what was written here."""
        if self._single is None:
            there = (self.folder / UNET_SPEC_FILE).is_file()
            return load_unet_spec(self.folder) if there else None
        return written_in(self._parts["unet"].opened)

    def _zeros(self) -> bool:
        return self.is_sdxl and bool(self._index.get("force_zeros_for_empty_prompt", True))
