from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from cascade.errors import UserError
from cascade.images import image_to_pixels
from cascade.text.picture_encoder import PictureEncoder, centre_square


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A published image encoder: the tower in one folder, its preprocessing in another."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=12,
        image_size=28,
        patch_size=14,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "image_encoder")
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28)
    processor.save_pretrained(tmp_path / "feature_extractor")
    return tmp_path / "image_encoder"


def smooth_picture() -> Image.Image:
    rows, columns = np.mgrid[0:90, 0:120]
    levels = np.stack([rows * 2, columns * 2, 255 - rows - columns], axis=-1)
    return Image.fromarray(levels.astype(np.uint8))


def test_a_published_encoder_embeds_as_transformers_does(folder: Path) -> None:
    image = smooth_picture()
    encoder = PictureEncoder.from_folder(folder)
    embeds = encoder(centre_square(image_to_pixels(image)[None]))
    processor = CLIPImageProcessor.from_pretrained(folder.parent / "feature_extractor")
    model = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = model(processor(image, return_tensors="pt").pixel_values).image_embeds
    assert encoder.channels == 12
    # Pillow rounds to 8 bits after its resize, and resizes before it cuts.
    torch.testing.assert_close(embeds, expected, atol=0.02 * float(expected.std()), rtol=0)


def test_a_missing_weight_is_named_and_not_made_up(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    del state["visual_projection.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing: visual_projection\.weight"):
        PictureEncoder.from_folder(folder)


def test_a_folder_that_does_not_say_how_pictures_enter_is_refused(folder: Path) -> None:
    (folder.parent / "feature_extractor/preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="how pictures enter"):
        PictureEncoder.from_folder(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"resample": 5}, "resample 5"), ({"crop_size": {"height": 32, "width": 32}}, "at 32 px")],
)
def test_a_preprocessing_that_does_not_fit_is_refused(
    folder: Path, changes: dict[str, object], message: str
) -> None:
    path = folder.parent / "feature_extractor/preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        PictureEncoder.from_folder(folder)
