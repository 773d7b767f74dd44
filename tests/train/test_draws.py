from __future__ import annotations

import pytest
import torch

from cascade.diffusion.weighting import draw_t
from train.draws import SeedLayers, StepDraws, derived_seed
from train.memory import keep_freed_memory


class Place:
    """Where a run stands, as Lightning says it."""

    def __init__(self, global_step: int, global_rank: int = 0) -> None:
        self.global_step, self.global_rank = global_step, global_rank
        self.world_size, self.accumulate_grad_batches = 1, 2


def test_seeds_of_purposes_seeds_steps_and_ranks_all_differ():
    seeds = {
        derived_seed(purpose, seed, step, rank)
        for purpose in ("order", "captions", "layers")
        for seed in range(5)
        for step in range(50)
        for rank in range(4)
    }
    assert len(seeds) == 3 * 5 * 50 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed("layers", 2**32 - 1, 10**9, 10**4) < 2**63


def all_draws(draws: StepDraws, count: int) -> list[torch.Tensor]:
    return [
        draws.uniform("drop", count),
        draws.normal("noise", (count, 3, 2)).flatten(1).T,
        draws.share("t", count, lambda n, g: draw_t(n, g, stratified=True)),
    ]


@pytest.mark.parametrize(("world", "micros"), [(2, 1), (1, 2), (4, 1), (2, 2)])
def test_the_parts_of_ranks_and_micro_batches_make_the_whole(world: int, micros: int) -> None:
    count = 8 // (world * micros)
    parts = [
        all_draws(StepDraws(5, 7, rank, world, micro, micros), count)
        for micro in range(micros)
        for rank in range(world)
    ]
    for whole, *pieces in zip(all_draws(StepDraws(5, 7), 8), *parts, strict=True):
        assert torch.equal(whole, torch.cat(pieces, dim=-1))
    assert len({StepDraws(5, 7, rank, 2).scalar("quantize") for rank in (0, 1)}) == 1


def test_every_seed_step_name_and_sample_draws_its_own() -> None:
    noise = [
        StepDraws(seed, step).normal(name, (2, 4))[row]
        for seed in (0, 1)
        for step in (0, 1, 10)
        for name in ("a", "b")
        for row in (0, 1)
    ]
    assert len({tuple(values.tolist()) for values in noise}) == len(noise)
    assert torch.equal(StepDraws(0, 1).normal("a", (2, 4))[0], noise[4])


def test_noise_is_standard_normal_and_its_samples_are_unrelated() -> None:
    noise = StepDraws(0, 3).normal("noise", (500, 40))
    assert abs(float(noise.mean())) < 0.03 and abs(float(noise.std()) - 1) < 0.02
    assert torch.corrcoef(noise)[0, 1:].abs().max() < 0.65


def test_layers_draw_by_the_step_s_number():
    with torch.random.fork_rng(devices=[]):
        draws = []
        for step, batch_idx in ((3, 6), (4, 8), (3, 6), (3, 7)):
            SeedLayers(0).on_train_batch_start(Place(step), None, None, batch_idx)
            draws.append(torch.rand(2).tolist())
    assert draws[0] == draws[2] != draws[1]
    assert draws[3] != draws[0], "the second micro-batch of a step drops others"


def test_memory_settings_are_taken_or_left_without_an_error(monkeypatch):
    assert keep_freed_memory() in (True, False)
    monkeypatch.setattr("sys.platform", "darwin")
    assert keep_freed_memory() is False
