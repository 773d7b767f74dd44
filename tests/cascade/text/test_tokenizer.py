from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from cascade.text.tokenizer import END, PAD, START, train_tokenizer

CAPTIONS = ["a 3D render of a red apple", "a flat icon of a blue fish", "a photo of a green hat"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(CAPTIONS, vocab_size=330, max_length=16)


def test_a_prompt_lies_between_the_start_and_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("a red apple").input_ids
    assert ids[0] == tokenizer.convert_tokens_to_ids(START)
    assert ids[-1] == tokenizer.convert_tokens_to_ids(END)
    assert START not in tokenizer.convert_ids_to_tokens(ids[1:])
    padded = tokenizer("a red apple", padding="max_length", max_length=16).input_ids
    assert padded[: len(ids)] == ids
    assert set(padded[len(ids) :]) == {tokenizer.convert_tokens_to_ids(PAD)}


def test_the_pooled_state_is_the_end_tokens_and_not_that_of_the_highest_id(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    # transformers pools at the highest id when eos_token_id is 2: words after it would be unseen.
    assert tokenizer.eos_token_id != 2
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModelWithProjection(config).eval()
    tokens = tokenizer("apple of a red hat", padding="max_length", return_tensors="pt")
    end = tokens.input_ids[0].tolist().index(tokenizer.eos_token_id)
    assert int(tokens.input_ids[0].argmax()) not in (0, end)
    with torch.no_grad():
        output = model(**tokens)
        expected = model.text_projection(output.last_hidden_state[:, end])
    torch.testing.assert_close(output.text_embeds, expected)


def test_case_and_the_spelling_of_accents_do_not_matter(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("A Red APPLE").input_ids == tokenizer("a red apple").input_ids
    assert tokenizer("caf\u00e9").input_ids == tokenizer("cafe\u0301").input_ids
    assert tokenizer("cafe").input_ids != tokenizer("caf\u00e9").input_ids


@pytest.mark.parametrize("prompt", ["", "xylophone", "Ω ∑ 漢字", "🐟 emoji", "tab\tand\nline"])
def test_no_prompt_is_out_of_vocabulary(tokenizer: PreTrainedTokenizerFast, prompt: str) -> None:
    ids = tokenizer(prompt).input_ids
    assert tokenizer.unk_token_id not in ids
    decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert decoded.strip() == prompt.lower().strip()


def test_frequent_words_become_one_token_within_the_size_asked_for() -> None:
    captions = ["a fish"] * 20 + ["a rare zebra"]
    tokenizer = train_tokenizer(captions, vocab_size=264, max_length=16)
    assert len(tokenizer) <= 264
    assert len(tokenizer("a fish", add_special_tokens=False).input_ids) == 2
    assert len(tokenizer("zebra", add_special_tokens=False).input_ids) > 2


def test_the_same_captions_give_the_same_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(CAPTIONS, vocab_size=330, max_length=16)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_a_saved_tokenizer_loads_without_a_network_and_reads_the_same(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path, local_files_only=True)
    assert loaded("a Blue fish").input_ids == tokenizer("a Blue fish").input_ids
    assert loaded.model_max_length == 16
    special = (loaded.bos_token, loaded.eos_token, loaded.pad_token)
    assert special == (START, END, PAD)
