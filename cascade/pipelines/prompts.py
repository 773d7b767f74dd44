"""Text states of prompts, encoded once each and one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from cascade.pipelines.finite import check_finite
from cascade.pipelines.plan import PicturePlan
from cascade.pipelines.sampling import Prompted
from cascade.text.encoder import TextEncoder, TextFeatures


class PromptStates:
    """Remembers the text states of prompts for one run.

    Each prompt is encoded alone: its states then do not depend on its neighbours in a batch, and a
    prompt that is cut is told about once.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        *,
        visit: Callable[[], AbstractContextManager[None]] = nullcontext,
        ahead: Sequence[str] = (),
    ) -> None:
        """Take the encoder.

        Args:
            encoder: The encoder.
            visit: Has it on the device inside.
            ahead: Prompts of the whole run, for an encoder that leaves the device again: all are
                encoded at its first visit, so that it has one.
        """
        self._encoder = encoder
        self._visit = visit
        self._ahead = tuple(ahead)
        self._known: dict[str, TextFeatures] = {}

    def __call__(self, prompts: Sequence[str]) -> TextFeatures:
        """Return hidden ``(B, L, D)`` and pooled ``(B, P)`` float32 states of prompts."""
        self._encode(prompts)
        features = [self._known[prompt] for prompt in prompts]
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

    def _encode(self, prompts: Sequence[str]) -> None:
        """Encode what is not known yet, and with it all that the run will ask for."""
        if all(prompt in self._known for prompt in prompts):
            return
        wanted = [*prompts, *self._ahead]
        if len({self._encoder.num_windows(prompt) for prompt in wanted}) > 1:
            wanted.append("")  # what shorter ones are lengthened with
        with self._visit():
            for prompt in dict.fromkeys(wanted):
                if prompt not in self._known:
                    features = self._encoder.encode([prompt])
                    check_finite(features.hidden, "the text encoder", features.hidden.dtype)
                    check_finite(features.pooled, "the text encoder", features.pooled.dtype)
                    self._known[prompt] = features

    def _lengthen(self, hidden: Tensor, length: int) -> Tensor:
        """Append windows of the null prompt, as the encoder itself does in a batch."""
        if hidden.shape[1] == length:
            return hidden
        null = self._known[""].hidden
        return torch.cat([hidden] + [null] * ((length - hidden.shape[1]) // null.shape[1]), dim=1)


def batches_of(
    plan: PicturePlan, states: Sequence[PromptStates], batch_size: int
) -> Iterator[range]:
    """Cut the pictures into batches of prompts of one length.

    A longer neighbour would lengthen a prompt, and so change its picture.
    """
    start = 0
    lengths = [
        tuple(one.num_windows([request.prompt, plan.negative_prompt]) for one in states)
        for request in plan.requests
    ]
    for index in range(1, len(lengths) + 1):
        ends = index == len(lengths) or lengths[index] != lengths[start]
        if ends or index - start == batch_size:
            yield range(start, index)
            start = index
