"""Text states of prompts, encoded once each and one at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade.pipelines.finite import check_finite
from cascade.pipelines.sampling import Prompted
from cascade.text.encoder import TextEncoder, TextFeatures


class PromptStates:
    """Remembers the text states of prompts for one run.

    Each prompt is encoded alone: its states then do not depend on its neighbours in a batch, and a
    prompt that is cut is told about once.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        """Take the encoder."""
        self._encoder = encoder
        self._known: dict[str, TextFeatures] = {}

    def __call__(self, prompts: Sequence[str]) -> TextFeatures:
        """Return hidden ``(B, L, D)`` and pooled ``(B, P)`` float32 states of prompts."""
        features = [self._one(prompt) for prompt in prompts]
        length = max(one.hidden.shape[1] for one in features)
        return TextFeatures(
            hidden=torch.cat([self._lengthen(one.hidden, length) for one in features]),
            pooled=torch.cat([one.pooled for one in features]),
        )

    def num_windows(self, prompts: Sequence[str]) -> int:
        """Return how many windows of the encoder the longest prompt takes; nothing is encoded."""
        return max(self._encoder.num_windows(prompt) for prompt in prompts)

    def pair(self, prompts: Sequence[str], negative_prompt: str) -> Prompted:
        """Return the states of prompts and of their common negative, all of one length."""
        count = len(prompts)
        both = self([*prompts, *[negative_prompt] * count])
        return Prompted(
            text=TextFeatures(both.hidden[:count], both.pooled[:count]),
            negative=TextFeatures(both.hidden[count:], both.pooled[count:]),
        )

    def _one(self, prompt: str) -> TextFeatures:
        if prompt not in self._known:
            features = self._encoder.encode([prompt])
            check_finite(features.hidden, "the text encoder", features.hidden.dtype)
            check_finite(features.pooled, "the text encoder", features.pooled.dtype)
            self._known[prompt] = features
        return self._known[prompt]

    def _lengthen(self, hidden: Tensor, length: int) -> Tensor:
        """Append windows of the null prompt, as the encoder itself does in a batch."""
        if hidden.shape[1] == length:
            return hidden
        null = self._one("").hidden
        return torch.cat([hidden] + [null] * ((length - hidden.shape[1]) // null.shape[1]), dim=1)
