"""A small tokenizer for models that are trained here: byte-level BPE with CLIP's conventions."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

PAD, START, END = "<|pad|>", "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(
    captions: Iterable[str], vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Learn a vocabulary from captions.

    Text is lower-cased; every byte has a token of its own, so no prompt is out of vocabulary. A
    prompt becomes ``<|startoftext|> ... <|endoftext|>``.

    Args:
        captions: The captions of the training set.
        vocab_size: Most tokens, the 256 bytes and three special ones included.
        max_length: Window of the text model, special tokens included.

    Returns:
        A tokenizer that ``save_pretrained`` writes and transformers loads without a network.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # END must not be token 2: transformers takes a CLIP whose eos_token_id is 2 for one of the
        # early exports and pools at the highest token id instead of the end.
        special_tokens=[START, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (START, END)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        model_max_length=max_length,
    )
