from __future__ import annotations

import dataclasses

import pytest
import torch

from stages.stage_c import StageC, StageCCondition, StageCConfig

TINY = StageCConfig(
    latent_channels=4,
    time_channels=8,
    cond_channels=8,
    hidden_channels=(8, 12),
    num_heads=(2, 3),
    down_blocks=(1, 1),
    up_blocks=(1, 1),
    text_channels=6,
    text_pooled_channels=5,
    pooled_tokens=3,
    image_channels=7,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": (2,)}, r"num_heads=\(2,\)"),
        ({"down_blocks": (1, 1, 1)}, r"down_blocks=\(1, 1, 1\)"),
        ({"up_blocks": ()}, r"up_blocks=\(\)"),
        ({"num_heads": (2, 5)}, r"num_heads=\(2, 5\) does not divide"),
        ({"num_heads": (0, 3)}, r"num_heads=\(0, 3\) does not divide"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_a_new_network_predicts_zero():
    network = StageC(TINY)
    cond = StageCCondition(torch.randn(2, 4, 6), torch.randn(2, 5))
    assert not network(torch.randn(2, 4, 3, 5), torch.rand(2), cond).any()


def test_tokens_are_text_then_pooled_then_every_image():
    network = StageC(TINY)
    text, pooled = torch.randn(2, 4, 6), torch.randn(2, 5)
    prepared = network.prepare(StageCCondition(text, pooled, image=torch.randn(2, 2, 7)))
    assert prepared.tokens.shape == (2, 4 + 3 + 2 * 3, 8)
    changed = network.prepare(StageCCondition(text, pooled + 1, image=torch.randn(2, 2, 7)))
    same = (prepared.tokens == changed.tokens).all(dim=(0, 2))
    assert same.tolist() == [True] * 4 + [False] * 9
    torch.testing.assert_close(prepared.tokens.mean(-1), torch.zeros(2, 13), atol=1e-5, rtol=0)


def test_a_condition_left_out_is_one_of_zeros():
    network = StageC(TINY)
    text, pooled = torch.randn(2, 4, 6), torch.randn(2, 5)
    short = network.prepare(StageCCondition(text, pooled))
    zero, image = torch.zeros(2), torch.zeros(2, 1, 7)
    told = network.prepare(StageCCondition(text, pooled, image, sca=zero, crp=zero))
    assert torch.equal(short.tokens, told.tokens)
    assert torch.equal(short.extra_embeddings.expand(2, -1, -1), told.extra_embeddings)


def test_a_network_without_images_refuses_one():
    network = StageC(dataclasses.replace(TINY, image_channels=None))
    cond = StageCCondition(torch.randn(1, 4, 6), torch.randn(1, 5))
    assert network.prepare(cond).tokens.shape == (1, 4 + 3, 8)
    with pytest.raises(ValueError, match="image_channels=None"):
        network.prepare(dataclasses.replace(cond, image=torch.zeros(1, 1, 7)))


def test_patches_larger_than_one_work():
    network = StageC(dataclasses.replace(TINY, patch_size=2))
    cond = StageCCondition(torch.randn(2, 4, 6), torch.randn(2, 5))
    assert network(torch.randn(2, 4, 6, 10), torch.rand(2), cond).shape == (2, 4, 6, 10)


def test_published_shapes_at_1024_pixels():
    with torch.device("meta"):
        network = StageC(dataclasses.replace(StageCConfig.lite(), down_blocks=(1, 1)))
        cond = StageCCondition(torch.empty(1, 77, 1280), torch.empty(1, 1280))
        prepared = network.prepare(cond)
    assert prepared.tokens.shape == (1, 85, 1536)
    assert prepared.extra_embeddings.shape == (1, 2, 64)
