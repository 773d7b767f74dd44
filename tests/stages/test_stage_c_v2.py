from __future__ import annotations

import dataclasses

import pytest
import torch

from stages.stage_c_v2 import StageCV2, StageCV2Condition, StageCV2Config

TINY = StageCV2Config(
    latent_channels=4,
    time_channels=8,
    hidden_channels=12,
    num_blocks=2,
    num_heads=3,
    text_channels=6,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide hidden_channels=12"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_blocks": 0}, "num_blocks=0 must be at least 1"),
        ({"time_channels": 9}, "time_channels=9 must be even"),
        ({"time_channels": 2}, "time_channels=2"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_a_new_network_predicts_its_input():
    """Its outputs a and b are zero, so (x - a) / (|1 - b| + 1e-5) is almost x."""
    network = StageCV2(TINY)
    x = torch.randn(2, 4, 3, 5)
    predicted = network(x, torch.rand(2), StageCV2Condition(torch.randn(2, 4, 6)))
    torch.testing.assert_close(predicted, x / (1 + 1e-5))


def test_the_prediction_is_made_of_two_outputs():
    network = StageCV2(TINY)
    with torch.no_grad():
        network.out.bias.copy_(torch.tensor([0.5] * 4 + [3.0] * 4))
    x = torch.randn(1, 4, 3, 5)
    predicted = network(x, torch.rand(1), StageCV2Condition(torch.randn(1, 4, 6)))
    torch.testing.assert_close(predicted, (x - 0.5) / (2 + 1e-5))


def test_new_weights_are_as_published():
    torch.manual_seed(0)
    network = StageCV2(dataclasses.replace(TINY, hidden_channels=96, text_channels=64))
    for layer in (network.text_expand, network.text_project, network.embedding):
        assert 0.018 < layer.weight.std() < 0.022
        assert not layer.bias.any()


def test_the_first_version_of_the_prior_is_a_narrower_text():
    with torch.device("meta"):
        network = StageCV2(StageCV2Config(text_channels=1024))
    assert sum(parameter.numel() for parameter in network.parameters()) == 993_243_680
