"""CLIP's picture tower: what Stage C is told of a picture to vary.

The folder is a transformers ``CLIPModel`` with both towers and our ``preprocessor.json``, or a
published ``CLIPVisionModelWithProjection`` with transformers' ``preprocessor_config.json``, in it
or in ``feature_extractor`` beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.config import from_dict, to_dict
from cascade.errors import UserError
from cascade.placed import example_of
from cascade.text.towers import OTHER_THAN_PICTURES, fill_tower, read_tower

_OWN_FILE = "preprocessor.json"
_PUBLISHED_FILE = "preprocessor_config.json"
_RESAMPLE: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of filters, as transformers stores them."""


@dataclass(frozen=True)
class PicturePreprocessing:
    """How pictures enter the picture tower; the content of ``preprocessor.json``."""

    image_size: int
    """Side of the square picture that the tower takes, in pixels."""
    mean: tuple[float, float, float]
    """Mean of each channel, for pixels in [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation of each channel, for pixels in [0, 1]."""
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    """Filter of the resize; both are antialiased."""

    def __post_init__(self) -> None:
        """Refuse values that would divide by zero or make an empty picture."""
        if self.image_size < 1 or min(self.std) <= 0:
            raise ValueError(f"image_size {self.image_size} and std {self.std} must be positive")

    def __call__(self, pixels: Tensor) -> Tensor:
        """Resize (antialiased, only if the size differs) and normalise.

        Args:
            pixels: ``(B, 3, H, W)`` in ``[0, 1]``; square, since nothing is cropped.

        Returns:
            ``(B, 3, image_size, image_size)``, normalised.

        Raises:
            ValueError: If the pictures are not square.
        """
        if pixels.shape[-1] != pixels.shape[-2]:
            raise ValueError(f"CLIP takes square pictures, got {tuple(pixels.shape)}")
        if pixels.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size, mode=self.resample, antialias=True).clamp(0, 1)
        mean = pixels.new_tensor(self.mean).view(1, 3, 1, 1)
        std = pixels.new_tensor(self.std).view(1, 3, 1, 1)
        return (pixels - mean) / std


class PictureEncoder(nn.Module):
    """The picture tower with its projection."""

    def __init__(self, model: nn.Module, preprocessing: PicturePreprocessing) -> None:
        """Take transformers' ``CLIPVisionModelWithProjection`` and the preprocessing."""
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing

    @property
    def channels(self) -> int:
        """Width of an embedding."""
        return int(self._model().visual_projection.out_features)

    def _model(self) -> Any:
        return self.model

    @classmethod
    @torch.inference_mode(False)
    def from_folder(
        cls,
        folder: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> PictureEncoder:
        """Load a local folder; nothing is downloaded.

        Raises:
            UserError: If the folder or one of its parts is missing or unreadable.
        """
        folder = Path(folder)
        preprocessing = find_preprocessing(folder)
        state = read_tower(folder, OTHER_THAN_PICTURES, device, dtype)
        # transformers takes seconds to import as a whole; these modules are enough.
        from transformers.models.clip.configuration_clip import CLIPVisionConfig
        from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

        values = _read_json(folder / "config.json")
        if "vision_config" in values:  # both towers
            values = {
                **values["vision_config"],
                "projection_dim": values.get("projection_dim", 512),
            }
        values["attn_implementation"] = "sdpa"
        try:
            with torch.device("meta"):
                model = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(values))
        except (TypeError, ValueError) as error:
            raise UserError(f"{folder}: not a CLIP with a picture tower: {error}") from error
        fill_tower(model, state, str(folder), device, "vision_model.")
        if preprocessing.image_size != model.config.image_size:
            raise UserError(
                f"{folder}: pictures are prepared at {preprocessing.image_size} px but the tower "
                f"takes {model.config.image_size}"
            )
        return cls(model, preprocessing).eval().requires_grad_(False)

    def save(self, folder: Path, preprocessing_folder: Path | None = None) -> None:
        """Write the tower and its preprocessing.

        Args:
            folder: Gets the weights, their configuration and, in our layout, the preprocessing.
            preprocessing_folder: Gets the preprocessing in transformers' form instead.
        """
        from cascade.checkpoints.files import atomic_write_text

        folder.mkdir(parents=True, exist_ok=True)
        self._model().save_pretrained(folder, safe_serialization=True)
        if preprocessing_folder is None:
            content = to_dict(self.preprocessing)
            atomic_write_text(folder / _OWN_FILE, json.dumps(content, indent=2) + "\n")
            return
        side = self.preprocessing.image_size
        numbers = {name: number for number, name in _RESAMPLE.items()}
        published = {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": side},
            "resample": numbers[self.preprocessing.resample],
            "do_center_crop": True,
            "crop_size": {"height": side, "width": side},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.preprocessing.mean),
            "image_std": list(self.preprocessing.std),
            "do_convert_rgb": True,
        }
        preprocessing_folder.mkdir(parents=True, exist_ok=True)
        path = preprocessing_folder / _PUBLISHED_FILE
        atomic_write_text(path, json.dumps(published, indent=2) + "\n")

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """Embed square pictures ``(B, 3, S, S)`` in [0, 1], as CLIP does it: ``(B, D)`` float32.

        These, not of unit length, are what Stage C is told of a picture.
        """
        weight = example_of(self.model)
        prepared = self.preprocessing(pixels.float().to(weight.device)).to(weight.dtype)
        projected: Tensor = self.model(pixel_values=prepared).image_embeds
        return projected.float()


def centre_square(pixels: Tensor) -> Tensor:
    """Cut the largest square out of the middle of ``(B, 3, H, W)``, as CLIP's own code does."""
    height, width = pixels.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[..., top : top + side, left : left + side]


def own_picture_encoder(folder: Path) -> Path | None:
    """Return where a model folder of ours holds a picture tower: alone, or in a whole CLIP."""
    places = (folder / "image_encoder", folder / "text")
    return next((place for place in places if (place / _OWN_FILE).is_file()), None)


def find_preprocessing(folder: Path) -> PicturePreprocessing:
    """Read how pictures enter a folder's picture tower.

    Raises:
        UserError: If no file says it, or one is not valid.
    """
    if (folder / _OWN_FILE).is_file():
        path = folder / _OWN_FILE
        return from_dict(PicturePreprocessing, _read_json(path), str(path))
    for path in (folder / _PUBLISHED_FILE, folder.parent / "feature_extractor" / _PUBLISHED_FILE):
        if path.is_file():
            return _from_published(path)
    raise UserError(
        f"{folder / _OWN_FILE}: missing, and {_PUBLISHED_FILE} too; it says how pictures enter the "
        "CLIP picture tower"
    )


def _from_published(path: Path) -> PicturePreprocessing:
    values = _read_json(path)
    size = values.get("crop_size", values.get("size", 224))
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge", 224))
    resample = values.get("resample", 3)
    if resample not in _RESAMPLE:
        raise UserError(f"{path}: resample {resample!r}: 2 (bilinear) or 3 (bicubic) is needed")
    content = {
        "image_size": size,
        "mean": values.get("image_mean", [0.48145466, 0.4578275, 0.40821073]),
        "std": values.get("image_std", [0.26862954, 0.26130258, 0.27577711]),
        "resample": _RESAMPLE[resample],
    }
    return from_dict(PicturePreprocessing, content, str(path))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is needed")
    return content
