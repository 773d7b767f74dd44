from __future__ import annotations

import dataclasses

import pytest
import torch

from stages.stage_b_v2 import StageBV2, StageBV2Condition, StageBV2Config

TINY = StageBV2Config(
    latent_channels=4,
    time_channels=8,
    cond_channels=8,
    hidden_channels=(8, 12, 12),
    num_heads=(0, 3, 2),
    num_blocks=(1, 2, 1),
    reads_compressed=(False, True, True),
    compressed_channels=4,
    text_channels=6,
    dropout=(0.0, 0.0, 0.0),
)


def condition(batch: int) -> StageBV2Condition:
    return StageBV2Condition(torch.randn(batch, 4, 3, 2), torch.randn(batch, 5, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": (2,)}, r"num_heads=\(2,\)"),
        ({"num_blocks": (1, 1, 1, 1)}, r"num_blocks=\(1, 1, 1, 1\)"),
        ({"reads_compressed": ()}, r"reads_compressed=\(\)"),
        ({"dropout": (0.1,)}, r"dropout=\(0.1,\)"),
        ({"num_heads": (0, 5, 2)}, r"num_heads=\(0, 5, 2\) does not divide"),
        ({"num_heads": (0, -1, 2)}, r"num_heads=\(0, -1, 2\)"),
        ({"time_channels": 9}, "time_channels=9 must be even"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_sides_that_the_levels_do_not_divide_are_refused():
    assert TINY.latent_multiple == 8 and StageBV2Config.full().latent_multiple == 16
    network = StageBV2(TINY)
    for size in ((12, 8), (8, 12), (7, 8)):
        message = f"{size[0]}x{size[1]}: both sides must be multiples of 8"
        with pytest.raises(ValueError, match=message):
            network(torch.randn(1, 4, *size), torch.rand(1), condition(1))


def test_a_new_network_predicts_twice_its_input():
    """Its outputs a and b are zero, so the divisor is sigmoid's middle."""
    network = StageBV2(TINY)
    x = torch.randn(2, 4, 8, 16)
    torch.testing.assert_close(network(x, torch.rand(2), condition(2)), 2 * x)


def test_the_prediction_is_made_of_two_outputs():
    network = StageBV2(TINY)
    with torch.no_grad():
        # Theirs and ours: channels first, then the four places of a patch.
        network.out.bias.copy_(torch.tensor([0.5] * 16 + [50.0] * 16))
    x = torch.randn(1, 4, 8, 8)
    predicted = network(x, torch.rand(1), condition(1))
    torch.testing.assert_close(predicted, (x - 0.5) / 0.999)


def test_each_level_that_reads_the_compressed_latent_has_a_mapper_for_each_way():
    network = StageBV2(TINY)
    assert list(network.down_mappers) == list(network.up_mappers) == ["1", "2"]
    prepared = network._mapped(condition(2), (16, 24))
    sizes = [None if m is None else tuple(m.shape) for m in prepared.down_mapped]
    assert sizes == [None, (2, 8, 4, 6), (2, 8, 2, 3)]
    sizes = [None if m is None else tuple(m.shape) for m in prepared.up_mapped]
    assert sizes == [(2, 8, 2, 3), (2, 8, 4, 6), None]
    assert prepared.tokens.shape == (2, 5, 8)


def test_the_finest_level_may_read_and_attend_and_another_may_not():
    config = dataclasses.replace(
        TINY, num_heads=(2, 0, 2), reads_compressed=(True, False, True), patch_size=1
    )
    network = StageBV2(config)
    assert network(torch.randn(1, 4, 4, 8), torch.rand(1), condition(1)).shape == (1, 4, 4, 8)
