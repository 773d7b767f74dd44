"""Published cascades on this disk: folders of diffusers, or the authors' own files.

What each file is is told by its content; folders' and files' names only say where to look.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from cascade.checkpoints.files import CLASS_KEY
from cascade.checkpoints.found import (
    FoundNetwork,
    TextFolder,
    choose_network,
    image_folder_in,
    networks_in,
    text_folders_in,
)
from cascade.checkpoints.hub import ModelFiles
from cascade.checkpoints.load import build
from cascade.checkpoints.part_files import title
from cascade.errors import UserError
from cascade.pipelines.files_hash import sampled_hash, text_files
from cascade.pipelines.parts import CascadeParts, Dialect
from cascade.pipelines.placement import STABLE_CASCADE, Dtypes, refuse_overflow
from cascade.pipelines.spec import (
    CONVERTED_SPEC_FILE,
    SPEC_FILE,
    CascadeSpec,
    Stage,
    StageSampling,
    load_spec,
)
from cascade.pipelines.trained import check_as_trained, trained_stage
from cascade.text.encoder import TextConfig, TextEncoder
from cascade.text.picture_encoder import PictureEncoder
from stages.stage_b import StageBConfig
from stages.stage_b_v2 import StageBV2Config
from stages.stage_c import StageCConfig
from stages.stage_c_v2 import StageCV2Config

V2_SCALE = 0.3764
V3_SCALE = 0.43
"""Stage A's latents are divided by this; diffusers' folder of v3 says v2's by mistake."""
V2_TIMES = tuple(
    [1.0 - index / 19 * (1 / 3) for index in range(20)]
    + [(2 / 3) * (1 - index / 10) for index in range(1, 11)]
)
_NEEDED = ("stage_c", "stage_b", "stage_a")
_CELLS = 42.67
_PUBLISHED = (
    StageCConfig.full(),
    StageCConfig.lite(),
    StageBConfig.full(),
    StageBConfig.lite(),
    StageCV2Config.full(),
    StageBV2Config.full(),
)


class PublishedFiles:
    """Würstchen v2 or Stable Cascade, in any published layout."""

    def __init__(self, files: ModelFiles, dialect: Dialect = "official") -> None:
        """Look through the folders; only headers are read.

        Raises:
            UserError: If a stage or a text encoder is missing, or the generations are mixed.
        """
        for folder in files.folders:
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder; name a model's folder")
        self.folder = files.folders[0]
        self.where = where = files.where
        self.dialect = dialect
        found = list(networks_in(files))
        self._parts = {
            kind: choose_network(found, kind, files.lite) for kind in ("stage_c", "stage_b")
        }
        self._parts |= {
            kind: choose_network(found, kind, lite=False)
            for kind in ("stage_a", "compressor", "previewer")
        }
        missing = [kind for kind in _NEEDED if self._parts[kind] is None]
        kinds = {one.published.kind for one in found}
        if {"stage_c", "autoencoder_kl"} <= kinds and "stage_b" not in kinds:
            raise UserError(
                f"{where}: a Stage C and a KL autoencoder, but no latent.json, which says how such "
                "a model is sampled; copy it from where the model comes from"
            )
        if len(missing) == len(_NEEDED):
            others = sorted({title(one.published.kind) for one in found})
            raise UserError(
                f"{where}: no model, but {' and '.join(others)} alone; name the folder of a whole "
                "model"
                if others
                else f"{where}: no model: neither model.json nor model_index.json nor any network "
                "that is known here; check the folder"
            )
        if missing:
            raise UserError(
                f"{where}: no {' and no '.join(missing)} in it; a cascade needs Stage C (prior), "
                "Stage B (decoder) and Stage A (vqgan): put them into one folder"
            )
        stage_c, stage_b = self._part("stage_c"), self._part("stage_b")
        if stage_c.published.generation != stage_b.published.generation:
            raise UserError(
                f"{where}: {stage_c.opened.where} is {stage_c.published.generation} and "
                f"{stage_b.opened.where} is {stage_b.published.generation}; use one generation"
            )
        self.generation = stage_c.published.generation
        self._declared = None
        if (self.folder / CONVERTED_SPEC_FILE).is_file():
            declared = load_spec(self.folder, CONVERTED_SPEC_FILE)
            # The published layouts have no place for a second network of a stage.
            self._declared = replace(declared, stage_b_few=None, stage_c_few=None)
            for name, part in (("stage_c", stage_c), ("stage_b", stage_b)):
                trained = trained_stage(part.opened.metadata, part.opened.where)
                where = f"{self.folder / CONVERTED_SPEC_FILE}: {name}."
                check_as_trained(getattr(declared, name), trained, part.opened.where, where)
        else:
            self._refuse_lost_settings()
        self._encoders = list(text_folders_in(files))
        self._image_encoder = image_folder_in(files)
        self._text = self._encoder_for(stage_c, "Stage C")
        self._text_b = self._encoder_for(stage_b, "Stage B")
        self.spec = self._make_spec(stage_b_own=self._text_b.folder != self._text.folder)
        if self._declared is not None:
            self.spec = self._as_declared(self._declared)

    def _refuse_lost_settings(self) -> None:
        """Refuse to sample as the published cascade what only shares its layout.

        Raises:
            UserError: A network of other sizes that was converted here, without its settings.
        """
        for kind in ("stage_c", "stage_b"):
            part = self._part(kind)
            if CLASS_KEY in part.opened.metadata and part.published.config not in _PUBLISHED:
                if part.published.layout == "ours":
                    raise UserError(
                        f"{part.opened.where}: a file of Cascade's own layout, but no {SPEC_FILE} "
                        f"in {self.where}; name the model's own folder"
                    )
                raise UserError(
                    f"{part.opened.where}: converted by Cascade, but {CONVERTED_SPEC_FILE}, which "
                    f"says how it is sampled, is not in {self.where}; copy it from the converted "
                    "folder"
                )

    def load(
        self, device: torch.device, dtypes: Dtypes, few: frozenset[Stage] = frozenset()
    ) -> CascadeParts:
        """Load the networks; published ones have none for ``few`` steps beside them.

        Raises:
            UserError: For float16 in Stage C, where Stable Cascade's overflows.
        """
        refuse_overflow(self.spec, dtypes, self.folder)

        def load(kind: str, to: torch.device = device) -> Any:
            return self._build(self._part(kind), to, dtypes.of(kind))

        text = _load_text(self._text, self.spec.text, device, dtypes.text)
        text_b = None
        if self.spec.text_b is not None:
            text_b = _load_text(self._text_b, self.spec.text_b, device, dtypes.text)
        extras: dict[str, Callable[[torch.device], Any]] = {
            kind: partial(load, kind)
            for kind in ("compressor", "previewer")
            if self._parts[kind] is not None
        }
        if self._image_encoder is not None:
            extras["image_encoder"] = partial(
                PictureEncoder.from_folder, self._image_encoder, dtype=dtypes.text
            )
        return CascadeParts(
            stage_c=load("stage_c"),
            stage_b=load("stage_b"),
            stage_a=load("stage_a"),
            text=text,
            text_b=text_b,
            extras=extras,
        )

    def weights_hash(self) -> str:
        """Hash the sizes and a part of the content of the networks' files and the encoders'.

        Whole ones are large.
        """
        digest = hashlib.sha256(self.dialect.encode())
        for kind, part in sorted(self._parts.items()):
            if part is not None:
                digest.update(f"{kind} {sampled_hash(part.path)}\n".encode())
        for encoder in self._encoders:
            for path in text_files(encoder.folder, encoder.tokenizer):
                digest.update(f"{path.name} {sampled_hash(path)}\n".encode())
        return digest.hexdigest()[:12]

    def metadata(self, name: str) -> dict[str, str]:
        """Return the metadata of a network's file."""
        return dict(self._part(name).opened.metadata)

    def _part(self, kind: str) -> FoundNetwork:
        part = self._parts[kind]
        assert part is not None, f"{kind} is not among the files"
        return part

    def _build(self, part: FoundNetwork, device: torch.device, dtype: torch.dtype) -> nn.Module:
        published = part.published
        network = build(part.opened, published, device=device, dtype=dtype)
        if published.kind == "stage_a":
            # The constant belongs to the Stage B that was trained on these latents.
            scale = published.config.scale
            if self._declared is not None:
                pass  # converted by us, and right
            elif self.dialect == "official" or "scale_factor" not in part.opened.declared:
                scale = V2_SCALE if self.generation == "v2" else V3_SCALE
            network.config = replace(published.config, scale=scale)  # type: ignore[assignment]
        return network

    def _encoder_for(self, part: FoundNetwork, stage: str) -> TextFolder:
        config = part.published.config
        width = getattr(config, "text_channels", None)
        if width is not None:
            widths_of = [(one, one.width) for one in self._encoders]
        else:  # Stable Cascade's Stage B reads the pooled states alone
            width = config.text_pooled_channels
            widths_of = [(one, one.pooled) for one in self._encoders]
        fitting = [one for one, own in widths_of if own == width]
        if not fitting:
            widths = ", ".join(f"{one.folder.name} ({own})" for one, own in widths_of)
            raise UserError(
                f"{self.where}: no text encoder {width} wide for {stage} (found: "
                f"{widths or 'none'}); put its folders text_encoder and tokenizer here, as the "
                "diffusers folder of the same model has them"
            )
        # Of two, the one in the stage's own pipeline folder.
        near = [one for one in fitting if part.path.is_relative_to(one.folder.parent)]
        return (near or fitting)[0]

    def _as_declared(self, declared: CascadeSpec) -> CascadeSpec:
        """Return what a conversion of ours says, less what the dialect of sampling decides."""
        if self.dialect == "official":
            return declared

        def sampled(own: StageSampling, there: StageSampling) -> StageSampling:
            # What predicts no epsilon is sampled with DDIM there.
            sampler = own.sampler if there.prediction == "epsilon" else "ddim"
            return replace(
                own,
                prediction=there.prediction,
                schedule=there.schedule,
                zero_terminal_snr=there.zero_terminal_snr,
                shift=there.shift,
                sampler=sampler,
            )

        return replace(
            declared,
            stage_c=sampled(self.spec.stage_c, declared.stage_c),
            stage_b=sampled(self.spec.stage_b, declared.stage_b),
        )

    def _make_spec(self, *, stage_b_own: bool) -> CascadeSpec:
        """Return the settings of the published weights."""
        base = CascadeSpec(
            name="wuerstchen-v2" if self.generation == "v2" else STABLE_CASCADE,
            image_size=1024,
            pixels_per_stage_c_cell=_CELLS,
            size_multiple=64 if self.generation == "v2" else 8,
            min_size=128,
            max_size=4096,
            generation="v2" if self.generation == "v2" else "v3",
        )
        if self.generation == "v2":
            raw = StageSampling(steps=12, guidance=1.0, time_input="raw", last_step="mean")
            times = V2_TIMES if self.dialect == "official" else ()
            stage_c = replace(
                raw,
                steps=29 if times else 60,
                guidance=4.0 if times else 8.0,
                times=times,
            )
            spec = replace(
                base,
                stage_c=stage_c,
                stage_b=raw,
                stage_c_scale=42.0,
                stage_c_shift=1.0,
                text=TextConfig(hidden="post_norm"),
                text_b=TextConfig(hidden="post_norm"),
                licence="MIT",
            )
        elif self.dialect == "official":
            spec = replace(
                base,
                stage_c=StageSampling(steps=20, guidance=4.0, rescale=0.7, shift=2.0),
                stage_b=StageSampling(steps=10, guidance=1.1, rescale=0.7),
                text=TextConfig(hidden="pre_norm"),
                text_b=TextConfig(hidden="pre_norm") if stage_b_own else None,
                licence="Stability AI non-commercial community licence",
            )
        else:
            raw = StageSampling(steps=20, guidance=4.0, time_input="raw", last_step="mean")
            spec = replace(
                base,
                stage_c=raw,
                stage_b=replace(raw, steps=10, guidance=1.0),
                text=TextConfig(hidden="pre_norm"),
                text_b=TextConfig(hidden="pre_norm") if stage_b_own else None,
                licence="Stability AI non-commercial community licence",
            )
        if self.dialect == "diffusers":
            return replace(spec, stage_b_cells_per_stage_c_cell=10.67)
        return spec


def _load_text(
    found: TextFolder, config: TextConfig, device: torch.device, dtype: torch.dtype
) -> TextEncoder:
    return TextEncoder.from_folder(
        found.folder, config, tokenizer_folder=found.tokenizer, device=device, dtype=dtype
    )
