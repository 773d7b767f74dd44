"""Prompts to text states, through transformers' CLIP text models of any size."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from cascade.errors import UserError
from cascade.placed import example_of
from cascade.text.towers import OTHER_THAN_TEXT, fill_tower, read_tower

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextConfig:
    """What the networks read of a text model; it travels with the cascade's weights."""

    hidden: Literal["pre_norm", "post_norm", "penultimate"] = "pre_norm"
    """Hidden states before the final layer norm (Stable Cascade), after it (Würstchen v2, SD), or
    before the last layer (SDXL)."""
    overflow: Literal["warn", "chunk"] = "warn"
    """A prompt longer than the window: use its beginning and name the words that are dropped, or
    encode it in windows and join their states."""
    pad_to: int | None = None
    """Tokens that prompts are padded to; None: the model's window (77 for OpenAI's CLIP)."""
    masks_padding: bool = True
    """Whether padding is left out of the attention; SD and SDXL were trained with it in."""


@dataclass(frozen=True)
class TextFeatures:
    """Text states of a batch of prompts."""

    hidden: Tensor  # (B, L, D)
    pooled: Tensor  # (B, P), projected

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.hidden)


class TextEncoder:
    """A tokenizer and a CLIP text model with its projection, in evaluation mode."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model: nn.Module, config: TextConfig
    ) -> None:
        """Take a tokenizer and a ``CLIPTextModelWithProjection``."""
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)
        self.config = config
        self._check_tokenizer()
        self.window = int(self._model_config().max_position_embeddings)
        if config.pad_to is not None and not 2 < config.pad_to <= self.window:
            raise UserError(
                f"text.pad_to is {config.pad_to}; the text model's window is {self.window} tokens"
            )
        self.length = config.pad_to or self.window
        self.hidden_channels = int(self._model_config().hidden_size)
        projects = hasattr(model, "text_projection")
        self.pooled_channels = (
            int(self._model_config().projection_dim) if projects else self.hidden_channels
        )

    def _check_tokenizer(self) -> None:
        """Refuse a tokenizer of another model, whose tokens would mean something else in silence.

        Raises:
            UserError: If it lacks a special token, has more tokens than the text model knows, or
                ends a prompt with another token than the one at which the text model pools.
        """
        tokenizer, model = self.tokenizer, self._model_config()
        tokens = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        lacking = [name for name, token in tokens.items() if token is None]
        if lacking:
            raise UserError(
                f"the tokenizer has no {' and no '.join(lacking)} token; its folder needs the "
                "tokenizer_config.json that belongs to it"
            )
        known = int(model.vocab_size)
        if len(tokenizer) > known:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens and the text model knows {known}; "
                "they belong to different models"
            )
        # transformers takes 2 for an early export and pools at the highest token of a prompt.
        pooled_at = len(tokenizer) - 1 if model.eos_token_id == 2 else model.eos_token_id
        if tokens["eos"] != pooled_at:
            raise UserError(
                f"the tokenizer ends prompts with token {tokens['eos']} and the text model pools "
                f"at token {pooled_at}; they belong to different models"
            )

    def _model_config(self) -> Any:
        return self.model.config

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        config: TextConfig,
        *,
        tokenizer_folder: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = torch.float32,
    ) -> TextEncoder:
        """Load a folder that holds a CLIP (both towers or the text one) and its tokenizer.

        Args:
            folder: Configuration and weights, in one file or in shards with an index.
            config: Which states are read.
            tokenizer_folder: Folder of the tokenizer, if it has one of its own (diffusers).
            device: Where the weights go.
            dtype: Number format of the weights; None keeps the file's.

        Raises:
            UserError: The folder or one of its files is missing or broken.
        """
        folder = Path(folder)
        tokens = folder if tokenizer_folder is None else Path(tokenizer_folder)
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json in it; a text encoder's folder needs one")
        state = read_tower(folder, OTHER_THAN_TEXT, device, dtype)
        # transformers takes seconds to import as a whole; these modules are enough.
        from transformers.models.clip.modeling_clip import (
            CLIPTextModel,
            CLIPTextModelWithProjection,
        )

        from cascade.checkpoints.files import on_meta

        projects = _projects(folder)
        try:
            tokenizer = load_tokenizer(tokens)
            text_config = _text_config(folder)
            with on_meta():
                model = (CLIPTextModelWithProjection if projects else CLIPTextModel)(text_config)
        except UserError:
            raise
        except Exception as error:  # tokenizers and the hub's checks raise plain Exceptions
            reason = " ".join(str(error).split())
            raise UserError(f"{folder}: not a readable CLIP folder: {reason}") from error
        fill_tower(model, state, str(folder), device, "text_model.")
        try:
            return cls(tokenizer, model, config)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error

    def null(self) -> TextFeatures:
        """Return the states of the empty prompt, the unconditional input of guidance."""
        return self.encode([""])

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Encode prompts.

        Returns:
            Hidden states ``(B, L, D)`` and pooled projections ``(B, P)``. With
            ``overflow="chunk"`` a batch with a long prompt has ``L`` of several windows, short
            prompts being padded with windows of the empty prompt, and the pooled projection is
            the mean over a prompt's windows.
        """
        rows = [self._windows(prompt) for prompt in prompts]
        most = max(len(windows) for windows in rows)
        empty = self._window_of([])
        flat = [window for row in rows for window in [*row, *[empty] * (most - len(row))]]
        device = example_of(self.model).device
        tokens = torch.tensor([ids for ids, _ in flat], device=device)  # (B * windows, L)
        mask = torch.tensor([kept for _, kept in flat], device=device)
        masked = mask if self.config.masks_padding else None
        output = self.model(input_ids=tokens, attention_mask=masked, output_hidden_states=True)
        hidden = output.last_hidden_state
        if self.config.hidden != "post_norm":
            hidden = output.hidden_states[-1 if self.config.hidden == "pre_norm" else -2]
        hidden = hidden.reshape(len(rows), most * self.length, -1)  # (B, windows * L, D)
        # A text model without a projection (Würstchen v2) gives the state at the prompt's end.
        pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
        pooled = pooled.reshape(len(rows), most, -1)
        pooled = torch.stack(
            [states[: len(row)].mean(dim=0) for states, row in zip(pooled, rows, strict=True)]
        )
        return TextFeatures(hidden, pooled)

    def num_windows(self, prompt: str) -> int:
        """Return the number of windows that a prompt's states fill: 1 unless it is chunked."""
        return len(self._windows(prompt)) if self.config.overflow == "chunk" else 1

    def _windows(self, prompt: str) -> list[tuple[list[int], list[int]]]:
        """Return (token ids, mask) of each window of a prompt; at least one."""
        # verbose=False: transformers warns of long prompts without naming what is lost; we name it.
        encoded = self.tokenizer(
            prompt,
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
            split_special_tokens=True,  # "<|endoftext|>" in a prompt is text, not its end
        )
        ids = list(encoded["input_ids"])
        room = self.length - 2  # without the two special tokens
        if len(ids) <= room:
            return [self._window_of(ids)]
        if self.config.overflow == "chunk":
            return [self._window_of(ids[i : i + room]) for i in range(0, len(ids), room)]
        first_dropped = encoded["offset_mapping"][room][0]
        _log.warning(
            "the prompt is %d tokens long and the text model reads %d; dropped: %r",
            len(ids),
            room,
            prompt[first_dropped:].strip(),
        )
        return [self._window_of(ids[:room])]

    def _window_of(self, ids: list[int]) -> tuple[list[int], list[int]]:
        tokenizer = self.tokenizer
        window = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        padding = self.length - len(window)
        pad = tokenizer.pad_token_id
        return window + [pad] * padding, [1] * len(window) + [0] * padding


def _text_config(folder: Path) -> Any:
    """Return the text tower's configuration from a CLIP's or a text model's ``config.json``."""
    from transformers.models.clip.configuration_clip import CLIPTextConfig

    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "text_config" in values:
        projection = values.get("projection_dim")
        values = dict(values["text_config"])
        if projection is not None:
            values["projection_dim"] = projection
    values["attn_implementation"] = "sdpa"
    return CLIPTextConfig.from_dict(values)


def _projects(folder: Path) -> bool:
    """Return whether the text model has a projection: all but Würstchen v2's have, and say so."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return values.get("architectures") != ["CLIPTextModel"]


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer from its one file, or from CLIP's vocabulary and merges.

    Raises:
        UserError: If the folder has neither, or they can't be read.
    """
    if (folder / "tokenizer.json").is_file():
        from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

        return _read_tokenizer(PreTrainedTokenizerFast, folder)
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: neither tokenizer.json nor {name} in it; a tokenizer's folder needs "
                "tokenizer.json, or vocab.json and merges.txt"
            )
    from transformers import CLIPTokenizerFast  # type: ignore[attr-defined]

    return _read_tokenizer(CLIPTokenizerFast, folder)


def _read_tokenizer(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a broken file is a bare Exception of tokenizers, or a KeyError
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise UserError(
            f"{folder}: its tokenizer can't be read ({reason}); download or export it again"
        ) from error
