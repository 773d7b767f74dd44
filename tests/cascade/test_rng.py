from __future__ import annotations

import pytest
import torch

from cascade.errors import UserError
from cascade.rng import MAX_SEED, PictureNoise, fresh_seed


def test_a_picture_of_a_batch_draws_what_its_seed_draws_alone() -> None:
    batch = PictureNoise([3, 4, 5])
    alone = PictureNoise([4])
    assert torch.equal(batch.randn((2, 3))[1], alone.randn((2, 3))[0])
    x = torch.zeros(3, 7)
    assert torch.equal(batch.randn_like(x)[1], alone.randn_like(x[:1])[0])


def test_neighbouring_seeds_draw_unrelated_noise() -> None:
    noise = PictureNoise(range(4)).randn((1000,))
    correlations = torch.corrcoef(noise) - torch.eye(4)
    assert correlations.abs().max() < 0.15
    assert noise.mean().abs() < 0.1 and (noise.std() - 1).abs() < 0.05


def test_streams_of_one_seed_differ_and_do_not_disturb_each_other() -> None:
    stage_b = PictureNoise([7], "stage_b")
    first = stage_b.randn((5,))
    stage_c = PictureNoise([7], "stage_c")
    assert not torch.equal(first, stage_c.randn((5,)))
    assert torch.equal(first, PictureNoise([7], "stage_b").randn((5,)))


def test_the_noise_of_a_seed_is_the_same_on_every_machine() -> None:
    drawn = PictureNoise([7], "stage_c").randn((3,))[0]
    expected = torch.tensor([-0.6298149228096008, 1.9725797176361084, -0.35711103677749634])
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    PictureNoise([1]).randn((4,))
    assert torch.equal(before, torch.get_rng_state())


def test_another_number_of_pictures_than_seeds_is_refused() -> None:
    with pytest.raises(ValueError, match="2 pictures, but 3 seeds"):
        PictureNoise([1, 2, 3]).randn_like(torch.zeros(2, 4))


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, True, 1.0])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(UserError, match="whole number from 0"):
        PictureNoise([seed])


def test_fresh_seeds_are_valid_and_differ() -> None:
    seeds = {fresh_seed() for _ in range(8)}
    assert len(seeds) > 1
    PictureNoise(sorted(seeds))
