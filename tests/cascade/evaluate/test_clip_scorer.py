from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from cascade.errors import UserError
from cascade.evaluate.clip_scorer import ClipScorer
from cascade.text.picture_encoder import PicturePreprocessing

# The end is not token 2: transformers would pool at the highest token instead.
WORDS = ["<start>", "<end>", "<pad>", "<unk>", "a", "red", "blue", "cat", "dog", "drawing", "of"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 2, "projection_dim": 8}
    text = {**tower, "vocab_size": len(WORDS), "max_position_embeddings": 8}
    text |= {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(tmp_path)
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unk>",
    ).save_pretrained(tmp_path)
    content = {"image_size": 16, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.5]}
    (tmp_path / "preprocessor.json").write_text(json.dumps(content))
    return tmp_path


def test_embeddings_are_those_of_transformers_at_unit_length(folder: Path):
    scorer = ClipScorer.from_folder(folder)
    prompts = ["a red cat", "a drawing of a blue dog"]
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    normalised = torch.stack(
        [(pixels[:, i] - m) / s for i, (m, s) in enumerate([(0.5, 0.2), (0.4, 0.25), (0.3, 0.5)])],
        dim=1,
    )
    with torch.inference_mode():
        output = model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=normalised,
        )
    torch.testing.assert_close(scorer.embed_prompts(prompts), output.text_embeds)
    torch.testing.assert_close(scorer.embed_pictures(pixels), output.image_embeds)


def test_embeddings_do_not_depend_on_the_batch(folder: Path):
    scorer = ClipScorer.from_folder(folder)
    prompts = ["cat", "a drawing of a dog", "blue"]
    torch.testing.assert_close(
        scorer.embed_prompts(prompts, batch_size=1), scorer.embed_prompts(prompts)
    )
    pixels = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(
        scorer.embed_pictures(pixels, batch_size=2), scorer.embed_pictures(pixels)
    )


def test_pictures_of_another_size_are_resized_to_the_tower(folder: Path):
    scorer = ClipScorer.from_folder(folder)
    plain = torch.full((1, 3, 16, 16), 0.25)
    larger = torch.full((1, 3, 40, 40), 0.25)
    torch.testing.assert_close(scorer.embed_pictures(larger), scorer.embed_pictures(plain))


def test_a_picture_that_is_not_square_is_refused():
    preprocessing = PicturePreprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="square"):
        preprocessing(torch.zeros(1, 3, 16, 20))


@pytest.mark.parametrize(
    ("name", "message"),
    [("preprocessor.json", "preprocessor.json"), ("model.safetensors", "no weights in it")],
)
def test_a_missing_part_of_the_folder_is_named(folder: Path, name: str, message: str):
    (folder / name).unlink()
    with pytest.raises(UserError, match=message):
        ClipScorer.from_folder(folder)


def test_a_preprocessing_file_with_an_unknown_key_names_it(folder: Path):
    content = {"image_sise": 16, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="image_sise"):
        ClipScorer.from_folder(folder)
