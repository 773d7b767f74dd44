from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerFast

from cascade.errors import UserError
from cascade.text.encoder import TextConfig, TextEncoder

WINDOW = 16
PROMPTS = ["a red apple", "a hat", ""]
LONG = "a red apple " * 6 + "tail"


@pytest.fixture(scope="module")
def folder(tiny_model: Path) -> Path:
    return tiny_model / "text"


@pytest.fixture(scope="module")
def reference(folder: Path) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection.from_pretrained(folder, local_files_only=True).eval()


@pytest.fixture
def encoder(folder: Path) -> TextEncoder:
    return TextEncoder.from_folder(folder, TextConfig())


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "text"))


@torch.no_grad()
def _transformers(reference: CLIPTextModelWithProjection, folder: Path) -> tuple[Tensor, ...]:
    """Return (hidden before the final norm, after it, pooled) of PROMPTS, without our code."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=WINDOW, return_tensors="pt")
    output = reference(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        output_hidden_states=True,
    )
    return output.hidden_states[-1], output.last_hidden_state, output.text_embeds


def test_hidden_states_before_the_final_norm_are_transformers_own(
    encoder: TextEncoder, reference: CLIPTextModelWithProjection, folder: Path
) -> None:
    features = encoder.encode(PROMPTS)
    before, _, pooled = _transformers(reference, folder)
    assert len(features) == 3
    assert features.hidden.shape == (3, WINDOW, 16) and features.pooled.shape == (3, 12)
    torch.testing.assert_close(features.hidden, before)
    torch.testing.assert_close(features.pooled, pooled)


def test_hidden_states_after_the_final_norm_are_transformers_own(
    reference: CLIPTextModelWithProjection, folder: Path
) -> None:
    features = TextEncoder.from_folder(folder, TextConfig(hidden="post_norm")).encode(PROMPTS)
    before, after, pooled = _transformers(reference, folder)
    torch.testing.assert_close(features.hidden, after)
    torch.testing.assert_close(features.pooled, pooled)
    assert not torch.allclose(before, after, atol=0.1), "else this test shows nothing"
    norm = reference.text_model.final_layer_norm
    torch.testing.assert_close(norm(before), after)


def test_the_pooled_state_depends_on_the_last_word(encoder: TextEncoder) -> None:
    hat, fish = encoder.encode(["a red hat", "a red fish"]).pooled
    assert not torch.allclose(hat, fish, atol=1e-4)


def test_the_null_prompt_is_the_empty_one(encoder: TextEncoder) -> None:
    null = encoder.null()
    assert null.hidden.shape == (1, WINDOW, 16)
    torch.testing.assert_close(null.hidden[0], encoder.encode(PROMPTS).hidden[2])
    assert not torch.allclose(null.hidden, encoder.encode(["a hat"]).hidden, atol=1e-3)


def test_a_prompt_of_a_batch_is_encoded_as_alone(encoder: TextEncoder) -> None:
    together = encoder.encode(PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt])
        torch.testing.assert_close(together.hidden[index], alone.hidden[0])
        torch.testing.assert_close(together.pooled[index], alone.pooled[0])


def test_less_padding_changes_no_state_that_stays(folder: Path, encoder: TextEncoder) -> None:
    short = TextEncoder.from_folder(folder, TextConfig(pad_to=12)).encode(["a red apple"])
    full = encoder.encode(["a red apple"])
    assert short.hidden.shape == (1, 12, 16)
    torch.testing.assert_close(short.hidden, full.hidden[:, :12])
    torch.testing.assert_close(short.pooled, full.pooled)


@pytest.mark.parametrize("pad_to", [2, WINDOW + 1])
def test_padding_that_does_not_fit_the_window_is_refused(folder: Path, pad_to: int) -> None:
    with pytest.raises(UserError, match=f"pad_to is {pad_to}; .* window is 16 tokens"):
        TextEncoder.from_folder(folder, TextConfig(pad_to=pad_to))


def test_a_long_prompt_is_cut_and_the_words_that_are_dropped_are_named(
    encoder: TextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        cut = encoder.encode([LONG])
    [record] = caplog.records
    message = record.getMessage()
    dropped = message.split("dropped: ")[1].strip("'\"")
    assert LONG.endswith(dropped) and dropped.endswith("tail")
    kept = LONG[: -len(dropped)]
    assert len(encoder.tokenizer(kept, add_special_tokens=False).input_ids) == WINDOW - 2
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(cut.hidden, encoder.encode([kept]).hidden)
    assert not caplog.records, "a prompt that just fits is no reason to warn"


def test_a_long_prompt_may_be_read_in_windows(
    folder: Path, encoder: TextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    chunked = TextEncoder.from_folder(folder, TextConfig(overflow="chunk"))
    with caplog.at_level(logging.WARNING):
        features = chunked.encode([LONG, "a hat"])
    assert not caplog.records, "nothing is dropped"
    ids = chunked.tokenizer(LONG, add_special_tokens=False).input_ids
    num_windows = -(-len(ids) // (WINDOW - 2))
    assert num_windows > 1
    assert features.hidden.shape == (2, num_windows * WINDOW, 16)
    # The first window is the cut prompt; a short prompt is filled up with empty ones.
    torch.testing.assert_close(features.hidden[0, :WINDOW], encoder.encode([LONG]).hidden[0])
    short, null = encoder.encode(["a hat"]), encoder.null()
    torch.testing.assert_close(features.hidden[1, :WINDOW], short.hidden[0])
    torch.testing.assert_close(features.hidden[1, WINDOW : 2 * WINDOW], null.hidden[0])
    torch.testing.assert_close(features.pooled[1], short.pooled[0])


def test_the_pooled_state_of_several_windows_is_their_mean(
    folder: Path, reference: CLIPTextModelWithProjection
) -> None:
    chunked = TextEncoder.from_folder(folder, TextConfig(overflow="chunk"))
    tokenizer, room = chunked.tokenizer, WINDOW - 2
    ids = tokenizer(LONG, add_special_tokens=False).input_ids
    pooled = []
    for start in range(0, len(ids), room):
        window = [tokenizer.bos_token_id, *ids[start : start + room], tokenizer.eos_token_id]
        with torch.no_grad():
            pooled.append(reference(input_ids=torch.tensor([window])).text_embeds)
    torch.testing.assert_close(chunked.encode([LONG]).pooled, torch.stack(pooled).mean(dim=0))


def test_the_text_tower_alone_gives_the_states_of_the_whole_clip(
    encoder: TextEncoder, reference: CLIPTextModelWithProjection, folder: Path, tmp_path: Path
) -> None:
    reference.save_pretrained(tmp_path)
    shutil.copy(folder / "tokenizer.json", tmp_path)
    shutil.copy(folder / "tokenizer_config.json", tmp_path)
    alone = TextEncoder.from_folder(tmp_path, TextConfig()).encode(PROMPTS)
    whole = encoder.encode(PROMPTS)
    torch.testing.assert_close(alone.hidden, whole.hidden)
    torch.testing.assert_close(alone.pooled, whole.pooled)


def test_the_model_is_frozen_and_takes_the_number_format_asked_for(folder: Path) -> None:
    encoder = TextEncoder.from_folder(folder, TextConfig(), dtype=torch.bfloat16)
    assert {p.dtype for p in encoder.model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert not any(module.training for module in encoder.model.modules())
    features = encoder.encode(["a hat"])
    assert features.hidden.dtype == features.pooled.dtype == torch.bfloat16


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _with(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _wider(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_size"] = 32
    (folder / "config.json").write_text(json.dumps(config))


def _settings(**changes: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["text_config"].update(changes)
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


def _fewer_tokens(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("token_embedding.weight"))
    weights[name] = weights[name][:50].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _settings(vocab_size=50)(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "no config.json in it"),
        (_without("config.json"), "no config.json in it"),
        (_without("model.safetensors"), "no weights in it"),
        (_without("tokenizer.json"), "neither tokenizer.json nor vocab.json"),
        (_with("config.json", "{"), "not valid JSON"),
        (_with("config.json", "[1]"), "not a JSON object"),
        (_with("config.json", '{"hidden_size": "x"}'), "not a readable CLIP folder"),
        (_with("tokenizer.json", "{"), "its tokenizer can.t be read"),
        (_with("tokenizer.json", "{}"), "its tokenizer can.t be read"),
        (_truncated, "not a whole safetensors file"),
        (_wider, "does not fit CLIPTextModelWithProjection"),
        (_without("tokenizer_config.json"), "no bos and no eos and no pad token"),
        (_fewer_tokens, "tokens and the text model knows 50"),
        (
            _settings(eos_token_id=3),
            "ends prompts with token 1 and the text model pools at token 3",
        ),
        (_settings(eos_token_id=2), "ends prompts with token 1 and the text model pools at token"),
    ],
)
def test_a_wrong_folder_is_one_line_that_names_it(
    copied: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(copied)
    with pytest.raises(UserError, match=message) as caught:
        TextEncoder.from_folder(copied, TextConfig())
    assert str(copied) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_special_token_in_a_prompt_is_text_and_does_not_end_it(copied: Path) -> None:
    encoder = TextEncoder.from_folder(copied, TextConfig(overflow="chunk"))
    one, other = (encoder.encode([f"a <|endoftext|> {word}"]) for word in ("hat", "fish"))
    assert not torch.equal(one.pooled, other.pooled)


def test_a_clip_that_lost_its_projection_is_refused(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(copied / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, copied / "model.safetensors")
    with pytest.raises(UserError, match=r"1 missing: text_projection\.weight"):
        TextEncoder.from_folder(copied, TextConfig())
