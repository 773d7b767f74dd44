"""A teacher's whole model with a student in the place of its U-Net, as a folder of diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.checkpoints.files import atomic_folder, atomic_write_text, save_network
from cascade.checkpoints.hub import resolve
from cascade.checkpoints.readers import CONFIG_FILE, read_json
from cascade.errors import UserError
from cascade.pipelines.unet_files import INDEX_FILE
from cascade.pipelines.unet_parts import open_unet_source
from cascade.pipelines.unet_spec import UNET_SPEC_FILE, UNetSpec
from cascade.tools.convert_unet import unet_config_of, why_not_diffusers
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet

_UNET = "unet"
_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_SHAPE_KEYS = ("num_attention_heads", "reverse_transformer_layers_per_block")
"""What a teacher's config.json may say of its shape that a student's need not."""


@dataclass(frozen=True)
class ModelFolder:
    """A teacher's folder of diffusers."""

    folder: Path
    spec: UNetSpec
    index: Mapping[str, Any]
    """Its ``model_index.json``."""

    def unet_config(self, student: UNetConfig) -> dict[str, Any]:
        """Return the student's ``config.json``: the teacher's, but for the shape.

        Raises:
            UserError: diffusers has no words for the student's depths.
        """
        path = self.folder / _UNET / CONFIG_FILE
        declared = read_json(path) if path.is_file() else {}
        # A list says something of each level, of which the student may have fewer.
        kept = {
            key: value
            for key, value in declared.items()
            if key not in _SHAPE_KEYS and not isinstance(value, list)
        }
        reason = why_not_diffusers(student)
        if reason is not None:
            raise UserError(f"--model-out: {reason}; leave --model-out out")
        return {**kept, **unet_config_of(student, self.spec.sample_size)}


def open_model(name: str) -> ModelFolder:
    """Find a teacher's folder of diffusers, here or on the hub.

    Raises:
        UserError: It is none.
    """
    files = resolve(name)
    folder = files.folders[0]
    whole = (folder / INDEX_FILE).is_file() and (folder / _UNET).is_dir()
    if Path(name).is_file() or not whole:
        raise UserError(
            f"--model-out: {name} is no folder of diffusers with a {INDEX_FILE}; leave it out, and "
            "sample with `sample.py --model MODEL --unet OUT/student.safetensors`"
        )
    return ModelFolder(folder, open_unet_source(files).spec, read_json(folder / INDEX_FILE))


def write_model(
    model: ModelFolder,
    student: UNet,
    content: Mapping[str, Any],
    out: Path,
    metadata: Mapping[str, str],
) -> None:
    """Copy a teacher's folder with the student in the place of its U-Net.

    Args:
        model: The teacher's folder.
        student: The student.
        content: Its ``config.json``.
        out: A new folder.
        metadata: What its file says of where it comes from.

    Raises:
        UserError: The folder can't be made, or the disk is full.
    """
    index = dict(model.index)
    with atomic_folder(out) as temporary:
        for name, entry in model.index.items():
            if name == _UNET or not isinstance(entry, list):
                continue
            if (model.folder / name).is_dir():
                shutil.copytree(model.folder / name, temporary / name)
            else:  # as a safety checker that was not downloaded
                index[name] = [None, None]
        for path in sorted(model.folder.iterdir()):
            if path.name == UNET_SPEC_FILE or path.name.upper().startswith(("LICENSE", "LICENCE")):
                shutil.copyfile(path, temporary / path.name)
        (temporary / _UNET).mkdir()
        metadata = {"format": "pt", **metadata}
        save_network(temporary / _UNET / _WEIGHTS_FILE, student, metadata=metadata)
        text = json.dumps(content, indent=2) + "\n"
        atomic_write_text(temporary / _UNET / CONFIG_FILE, text)
        atomic_write_text(temporary / INDEX_FILE, json.dumps(index, indent=2) + "\n")
