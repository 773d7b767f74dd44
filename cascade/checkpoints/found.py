"""What the folders of a model hold: networks, text encoders, the picture tower.

What each file is is told by its content; folders' and files' names only say where to look.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cascade.checkpoints.detect import Published, num_parameters
from cascade.checkpoints.files import CLASS_KEY, CONFIG_KEY
from cascade.checkpoints.hub import ModelFiles
from cascade.checkpoints.load import identify
from cascade.checkpoints.readers import (
    PICKLE_SUFFIXES,
    Opened,
    is_entry,
    open_weights,
    read_json,
)
from cascade.errors import UserError

_SAFETY_CHECKER = "StableDiffusionSafetyChecker"
_ENDING = re.compile(r"\.(safetensors|bin|pt|pth|ckpt)(\..*)?$")
_MARK = re.compile(r"[._-](fp16|bf16|fp32|fp8|non_ema|ema)$")
"""What tells variants of one network apart, at the end of its file's name."""
_DIFFUSERS_NAME = "diffusion_pytorch_model"


def told_by(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what a file says of a network beside its class and sizes: how it was trained."""
    own = ("format", CLASS_KEY, CONFIG_KEY)
    return {key: value for key, value in metadata.items() if key not in own}


@dataclass(frozen=True)
class FoundNetwork:
    """One network's weights."""

    opened: Opened
    published: Published
    path: Path
    """The file, or the index of shards."""

    @property
    def told(self) -> dict[str, str]:
        """What its file says of it beside its class and sizes, such as what its training cost."""
        return told_by(self.opened.metadata)

    @property
    def values(self) -> int:
        """Numbers in all its tensors."""
        return num_parameters(self.opened.shapes)


@dataclass(frozen=True)
class TextFolder:
    """A text encoder with its tokenizer."""

    folder: Path
    tokenizer: Path
    width: int
    """Channels of the states of tokens."""
    pooled: int
    """Channels of the projected, pooled state."""


def networks_in(files: ModelFiles) -> Iterator[FoundNetwork]:
    """Yield every network of a cascade in a model's folders and two levels below."""
    for path in (path for folder in files.folders for path in _entries(folder, depth=2)):
        if files.files is not None and path not in files.files:
            continue
        if _is_text_encoder(path.parent):
            continue
        for opened in open_weights(path):
            try:
                published = identify(opened)
            except UserError:
                continue  # an image encoder, a LoRA: no part of the cascade's own networks
            yield FoundNetwork(opened, published, path)


def choose_network(found: Sequence[FoundNetwork], kind: str, lite: bool) -> FoundNetwork | None:
    """Choose among files of one kind: the large network unless ``lite``, the unmarked variant."""
    fitting = [one for one in found if one.published.kind == kind]
    if not fitting:
        return None
    sizes = {one.values for one in fitting}
    wanted = min(sizes) if lite else max(sizes)
    fitting = [one for one in fitting if one.values == wanted]
    return min(fitting, key=lambda one: (one.path.suffix in PICKLE_SUFFIXES, len(one.path.name)))


def one_unet(found: Sequence[FoundNetwork], where: str | Path) -> FoundNetwork | None:
    """Return the U-Net among networks: of its variants the unmarked one; None: there is none.

    One of diffusers' own name is meant, whatever lies beside it.

    Args:
        found: Networks of a folder.
        where: The folder.

    Raises:
        UserError: If there are several: none of them is more the one that is meant than others.
    """
    by_name: dict[Path, list[FoundNetwork]] = {}
    for one in found:
        if one.published.kind == "unet":
            plain = _ENDING.sub("", one.path.name)
            while _MARK.search(plain):
                plain = _MARK.sub("", plain)
            by_name.setdefault(one.path.parent / plain, []).append(one)
    named = [variants for path, variants in by_name.items() if path.name == _DIFFUSERS_NAME]
    if len(named) == 1:
        return choose_network(named[0], "unet", False)
    if len(by_name) > 1:
        paths = [variants[0].path for variants in by_name.values()]
        names = [str(path.relative_to(where) if path.is_relative_to(where) else path.name)
                 for path in paths]  # fmt: skip
        more = ", ..." if len(names) > 5 else ""
        raise UserError(
            f"{where}: several U-Nets in it; name one: {', '.join(sorted(names)[:5])}{more}"
        )
    return choose_network([one for variants in by_name.values() for one in variants], "unet", False)


def text_folders_in(files: ModelFiles) -> Iterator[TextFolder]:
    """Yield the text encoders in the folders and two levels below, each with its tokenizer."""
    for config in (path for folder in files.folders for path in _configs(folder)):
        if files.files is not None and config not in files.files:
            continue
        encoder = text_folder(config.parent)
        if encoder is not None:
            yield encoder


def text_folder(home: Path) -> TextFolder | None:
    """Return the text encoder of a folder, whose tokenizer is in it or beside it; None: neither."""
    values = read_json(home / "config.json")
    if _SAFETY_CHECKER in values.get("architectures", ()):
        return None  # it has a text_config too, but no text tower
    if "text_config" in values:
        own = values["text_config"]
        projection = values.get("projection_dim", own.get("projection_dim", 512))
        values = {**own, "model_type": "clip_text_model", "projection_dim": projection}
    if values.get("model_type") != "clip_text_model":
        return None
    names = (home.name.replace("text_encoder", "tokenizer"), "tokenizer", home.name)
    for name in names:
        tokenizer = home.parent / name
        if any((tokenizer / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            width, pooled = values.get("hidden_size", 512), values.get("projection_dim", 512)
            if values.get("architectures") == ["CLIPTextModel"]:  # its config names a projection
                pooled = width  # that it does not have
            return TextFolder(home, tokenizer, int(width), int(pooled))
    return None


def image_folder_in(files: ModelFiles) -> Path | None:
    """Find the folder of CLIP's picture tower, which tells Stage C of a picture to vary."""
    for config in (path for folder in files.folders for path in _configs(folder)):
        if files.files is not None and config not in files.files:
            continue
        if read_json(config).get("model_type") == "clip_vision_model":
            return config.parent
    return None


def _entries(folder: Path, depth: int) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and depth:
            yield from _entries(path, depth - 1)
        elif is_entry(path):
            yield path


def _is_text_encoder(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and str(read_json(config).get("model_type", "")).startswith("clip")


def _configs(folder: Path) -> list[Path]:
    return sorted((*folder.glob("*/config.json"), *folder.glob("*/*/config.json")))
