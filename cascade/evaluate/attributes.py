"""Did the picture get what the prompt asked for: a CLIP chooses among the values of an attribute.

A prompt asks for a style, a colour, a concept. For one of them the CLIP is offered every value,
the rest of the prompt unchanged, and the one that it finds most like the picture is its answer.
It is a zero-shot classifier: how good a judge it is shows in its accuracy on the real pictures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.errors import UserError
from cascade.evaluate.prompts import Prompt
from cascade.evaluate.protocol import Attribute

Embed = Callable[[Sequence[str]], Tensor]
"""Texts to unit vectors ``(N, D)``."""
_VOWELS = tuple("aeiouAEIOU")


@dataclass(frozen=True)
class Question:
    """One prompt and the wordings of each value that an attribute could have in it."""

    row: int
    """The prompt's place in the list."""
    wordings: tuple[tuple[str, ...], ...]
    """For each value."""
    answer: int
    """Which of them the prompt asks for."""


def make_questions(attribute: Attribute, prompts: Sequence[Prompt]) -> list[Question]:
    """Return a question for each prompt that names a value of the attribute.

    Raises:
        UserError: If no prompt names one, or a phrase asks for an attribute that a prompt lacks.
    """
    name = attribute.field
    asking = [(i, p) for i, p in enumerate(prompts) if p.attributes.get(name)]
    if attribute.phrases:
        values = list(attribute.phrases)
        asking = [(i, p) for i, p in asking if p.attributes[name] in attribute.phrases]
        questions = [
            Question(
                row,
                tuple(_filled(attribute, value, prompt) for value in values),
                values.index(prompt.attributes[name]),
            )
            for row, prompt in asking
        ]
    else:
        asking = [(i, p) for i, p in asking if _place(p.text, p.attributes[name]) is not None]
        values = sorted({prompt.attributes[name] for _, prompt in asking})
        questions = [
            Question(
                row,
                tuple((replaced(prompt.text, prompt.attributes[name], v),) for v in values),
                values.index(prompt.attributes[name]),
            )
            for row, prompt in asking
        ]
    if not questions or len(values) < 2:
        raise UserError(
            f"attribute {name!r}: the prompts name {len(values) if questions else 0} of its "
            "values; two are needed to choose between"
        )
    return questions


def answers(questions: Sequence[Question], pictures: Tensor, embed: Embed) -> Tensor:
    """Return for each question whether the picture's CLIP vector is nearest to the right value.

    The vectors of a value's wordings are averaged, as zero-shot classifiers do. A tie is wrong.

    Args:
        questions: From :func:`make_questions`.
        pictures: ``(N, D)`` vectors of all pictures of the list.
        embed: The CLIP's text tower.

    Returns:
        ``(len(questions),)`` of bool.
    """
    texts = sorted({text for q in questions for wording in q.wordings for text in wording})
    vectors = embed(texts).double()
    rows = {text: row for row, text in enumerate(texts)}
    right = []
    for question in questions:
        values = torch.stack(
            [vectors[[rows[text] for text in wording]].mean(0) for wording in question.wordings]
        )
        scores = F.normalize(values, dim=1) @ pictures[question.row].double()
        others = torch.cat([scores[: question.answer], scores[question.answer + 1 :]])
        right.append(bool(scores[question.answer] > others.max()))
    return torch.tensor(right)


def replaced(text: str, value: str, other: str) -> str:
    """Return a prompt with another value in place of its own, the article before it as needed."""
    place = _place(text, value)
    assert place is not None, "asked before"
    start, end = place.span()
    head = text[:start]
    article = re.search(r"\b(an?) $", head, flags=re.IGNORECASE)
    if article is not None and other != value:
        new = "an" if other.startswith(_VOWELS) else "a"
        head = f"{head[: article.start()]}{new.capitalize() if article[1][0] == 'A' else new} "
    return f"{head}{other}{text[end:]}"


def _place(text: str, value: str) -> re.Match[str] | None:
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text)


def _filled(attribute: Attribute, value: str, prompt: Prompt) -> tuple[str, ...]:
    try:
        return tuple(phrase.format(**_fields(prompt)) for phrase in attribute.phrases[value])
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"attribute {attribute.field!r}: a phrase of {value!r} asks for {error}, which the "
            f"prompt {prompt.key!r} does not have"
        ) from error


def _fields(prompt: Prompt) -> dict[str, str]:
    fields = dict(prompt.attributes)
    name = fields.get("name", "")
    fields["a_name"] = f"{'an' if name.startswith(_VOWELS) else 'a'} {name}"
    return fields
