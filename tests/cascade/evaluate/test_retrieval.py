from __future__ import annotations

import pytest
import torch

from cascade.errors import UserError
from cascade.evaluate.retrieval import (
    agreement,
    derangement,
    draw_candidates,
    true_ranks,
    wilson_interval,
)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _pool(count: int) -> tuple[list[str], list[str]]:
    return [f"a drawing of thing {i}" for i in range(count)], [f"thing {i}" for i in range(count)]


def test_perfect_embeddings_rank_every_prompt_first():
    embeddings = torch.eye(120)
    captions, identities = _pool(120)
    candidates = draw_candidates(range(120), captions, identities, 100, _generator())
    found = agreement(true_ranks(embeddings, embeddings, candidates))
    assert (found.top_1.hits, found.top_1.trials, found.top_1.rate) == (120, 120, 1.0)
    assert found.top_5.rate == 1.0 and found.top_5.interval.high == 1.0


def test_shuffled_pictures_rank_at_chance():
    count = 1500
    embeddings = torch.randn(count, 32, generator=_generator(1))
    captions, identities = _pool(count)
    candidates = draw_candidates(range(count), captions, identities, 100, _generator(2))
    shuffled = embeddings[derangement(count, _generator(3))]
    found = agreement(true_ranks(shuffled, embeddings, candidates))
    # Chance is 1 % and 5 %; four standard deviations on each side.
    assert found.top_1.rate == pytest.approx(0.01, abs=4 * (0.01 * 0.99 / count) ** 0.5)
    assert found.top_5.rate == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / count) ** 0.5)


def test_a_yardstick_that_gives_everything_one_vector_ranks_last():
    same = torch.ones(10, 4)
    candidates = draw_candidates(range(10), *_pool(10), 10, _generator())
    assert true_ranks(same, same, candidates).tolist() == [10] * 10


def test_the_rank_counts_the_candidates_that_are_nearer():
    prompts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
    picture = torch.tensor([[2.0, 1.5]])
    candidates = torch.tensor([[0, 1, 2, 3]])
    assert true_ranks(picture, prompts, candidates).tolist() == [2]


def test_a_broken_embedding_is_refused_and_not_ranked():
    broken = torch.tensor([[float("nan"), 1.0]])
    with pytest.raises(ValueError, match="not finite"):
        true_ranks(broken, torch.eye(2), torch.tensor([[0, 1]]))


def test_candidates_hold_no_caption_and_no_identity_twice():
    # Sixty things, each with two wordings, and every tenth caption shared by two things.
    captions = [f"wording {w} of {'all' if i % 10 == 0 else i}" for i in range(60) for w in (0, 1)]
    identities = [str(i) for i in range(60) for _ in (0, 1)]
    queries = list(range(0, 120, 3))
    candidates = draw_candidates(queries, captions, identities, 50, _generator())
    assert candidates.shape == (40, 50)
    for query, row in zip(queries, candidates.tolist(), strict=True):
        assert row[0] == query
        assert len({captions[i] for i in row}) == 50
        assert len({identities[i] for i in row}) == 50


def test_candidates_depend_on_the_seed_alone():
    pool = _pool(200)
    first = draw_candidates([3, 7], *pool, 100, _generator(5))
    again = draw_candidates([3, 7], *pool, 100, _generator(5))
    other = draw_candidates([3, 7], *pool, 100, _generator(6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_pool_with_too_few_captions_is_refused():
    with pytest.raises(UserError, match="only 20 of 100"):
        draw_candidates([0], *_pool(20), 100, _generator())


@pytest.mark.parametrize("count", [2, 3, 50])
def test_a_derangement_moves_everything_and_loses_nothing(count: int):
    places = derangement(count, _generator(count))
    assert sorted(places.tolist()) == list(range(count))
    assert not (places == torch.arange(count)).any()


def test_one_picture_cannot_be_shuffled():
    with pytest.raises(ValueError, match="cannot be shuffled"):
        derangement(1, _generator())


def test_wilson_intervals_have_their_published_values():
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611.
    interval = wilson_interval(81, 263)
    assert (interval.low, interval.high) == (
        pytest.approx(0.2553, abs=5e-5),
        pytest.approx(0.3662, abs=5e-5),
    )
    none = wilson_interval(0, 20)
    assert none.low == 0.0 and none.high == pytest.approx(0.1611, abs=5e-5)
    every = wilson_interval(20, 20)
    assert every.high == 1.0 and every.low == pytest.approx(1 - 0.1611, abs=5e-5)


@pytest.mark.parametrize(("hits", "trials"), [(1, 0), (5, 4), (-1, 4)])
def test_impossible_counts_have_no_interval(hits: int, trials: int):
    with pytest.raises(ValueError, match="no interval"):
        wilson_interval(hits, trials)
