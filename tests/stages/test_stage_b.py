from __future__ import annotations

import dataclasses

import pytest
import torch

from stages.stage_b import StageB, StageBCondition, StageBConfig

TINY = StageBConfig(
    latent_channels=4,
    time_channels=8,
    cond_channels=8,
    hidden_channels=(8, 12),
    num_heads=(0, 3),
    down_blocks=(1, 1),
    up_blocks=(1, 1),
    up_repeats=(2, 3),
    compressed_channels=4,
    text_pooled_channels=5,
    pooled_tokens=3,
    dropout=(0.0, 0.0),
)


def condition(batch: int) -> StageBCondition:
    return StageBCondition(torch.randn(batch, 4, 3, 2), torch.randn(batch, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": (2,)}, r"num_heads=\(2,\)"),
        ({"down_blocks": (1, 1, 1)}, r"down_blocks=\(1, 1, 1\)"),
        ({"up_blocks": ()}, r"up_blocks=\(\)"),
        ({"up_repeats": (1,)}, r"up_repeats=\(1,\)"),
        ({"dropout": (0.1,)}, r"dropout=\(0.1,\)"),
        ({"num_heads": (0, 5)}, r"num_heads=\(0, 5\) does not divide"),
        ({"time_conds": ("crop",)}, r"'crop' is none of \('sca', 'cfg'\)"),
        ({"time_channels": 2}, "time_channels=2 must be even and at least 4"),
        ({"kernel_size": 4}, "kernel_size=4 must be odd"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_a_new_network_predicts_zero():
    network = StageB(TINY)
    assert not network(torch.randn(2, 4, 6, 10), torch.rand(2), condition(2)).any()


@pytest.mark.parametrize("size", [(7, 8), (8, 7)])
def test_sides_that_no_patch_divides_are_refused(size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}: both sides must be multiples of 2"):
        StageB(TINY)(torch.randn(1, 4, *size), torch.rand(1), condition(1))


def test_repeats_share_the_blocks_but_not_the_mappers():
    once = StageB(dataclasses.replace(TINY, up_repeats=(1, 1)))
    repeated = StageB(TINY)
    more = set(repeated.state_dict()) - set(once.state_dict())
    names = {f"repeat_mappers.{i}.{j}" for i, j in ((0, 0), (1, 0), (1, 1))}
    assert more == {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def test_conditions_left_out_are_ones_of_zeros():
    network = StageB(TINY)
    cond = condition(2)
    short = network.prepare(cond, (8, 12))
    zeros = dataclasses.replace(cond, pixels=torch.zeros(2, 3, 8, 8), sca=torch.zeros(2))
    told = network.prepare(zeros, (8, 12))
    assert torch.equal(short.mapped, told.mapped)
    assert torch.equal(short.extra_embeddings.expand(2, -1, -1), told.extra_embeddings)
    assert short.tokens.shape == (2, 3, 8) and short.mapped.shape == (2, 8, 4, 6)


def test_a_network_without_the_pixel_condition_works():
    network = StageB(dataclasses.replace(TINY, pixel_condition=False, time_conds=()))
    assert network(torch.randn(1, 4, 6, 10), torch.rand(1), condition(1)).shape == (1, 4, 6, 10)


def test_any_resolution_of_the_compressed_latent_will_do():
    network = StageB(TINY)
    for size in ((1, 1), (5, 3), (24, 24)):
        cond = StageBCondition(torch.randn(1, 4, *size), torch.randn(1, 5))
        assert network.prepare(cond, (8, 12)).mapped.shape == (1, 8, 4, 6)
