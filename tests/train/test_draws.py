from __future__ import annotations

import torch

from train.draws import SeedLayers, derived_seed, step_generator
from train.memory import keep_freed_memory


class Place:
    """Where a run stands, as Lightning says it."""

    def __init__(self, global_step: int, global_rank: int = 0) -> None:
        self.global_step, self.global_rank = global_step, global_rank


def test_seeds_of_purposes_seeds_steps_and_ranks_all_differ():
    seeds = {
        derived_seed(purpose, seed, step, rank)
        for purpose in ("order", "captions", "noise", "layers")
        for seed in range(5)
        for step in range(50)
        for rank in range(4)
    }
    assert len(seeds) == 4 * 5 * 50 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed("noise", 2**32 - 1, 10**9, 10**4) < 2**63


def test_a_step_s_noise_depends_on_seed_step_and_rank_alone():
    draw = {
        key: torch.rand(3, generator=step_generator(Place(*key[1:]), key[0])).tolist()
        for key in [(0, 5, 0), (1, 5, 0), (0, 6, 0), (0, 5, 1)]
    }
    assert len({tuple(values) for values in draw.values()}) == 4
    assert torch.rand(3, generator=step_generator(Place(5), 0)).tolist() == draw[0, 5, 0]


def test_the_times_of_a_step_do_not_follow_the_captions_that_were_drawn():
    noise = torch.rand(64, generator=step_generator(Place(7), 0))
    captions = torch.rand(
        64, generator=torch.Generator().manual_seed(derived_seed("captions", 0, 7))
    )
    assert torch.corrcoef(torch.stack([noise, captions]))[0, 1].abs() < 0.5


def test_layers_draw_by_the_step_s_number():
    with torch.random.fork_rng(devices=[]):
        draws = []
        for step in (3, 4, 3):
            SeedLayers(0).on_train_batch_start(Place(step), None, None, 0)
            draws.append(torch.rand(2).tolist())
    assert draws[0] == draws[2] != draws[1]


def test_memory_settings_are_taken_or_left_without_an_error(monkeypatch):
    assert keep_freed_memory() in (True, False)
    monkeypatch.setattr("sys.platform", "darwin")
    assert keep_freed_memory() is False
