"""The fast decoder of Stage A: sizes, how far it sees, and in Stage A's place."""

from __future__ import annotations

import pytest
import torch

from stages.stage_a import StageA, StageAConfig
from stages.stage_a_fast import FastDecodedStageA, StageAFast, StageAFastConfig

STAGE_A = StageAConfig(
    channels=(8, 16), encoder_blocks=(1, 1), decoder_blocks=(1, 1), codebook_size=16
)


def made(config: StageAFastConfig) -> StageAFast:
    torch.manual_seed(0)
    network = StageAFast(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return network.eval()


@pytest.mark.parametrize(
    ("channels", "blocks"), [((8, 8), (1, 1)), ((8,), (2,)), ((6, 8, 4), (0, 2, 1))]
)
def test_a_pixel_depends_on_the_cells_within_reach_and_on_no_other(channels, blocks):
    config = StageAFastConfig(channels=channels, blocks=blocks)
    network, side = made(config).double(), 2 * config.reach + 3
    latents = torch.randn(1, 4, side, side, dtype=torch.float64).requires_grad_()
    pixels = network(latents)
    assert pixels.shape == (1, 3, side * config.upscale, side * config.upscale)
    middle = side // 2
    first = middle * config.upscale  # the pixels of the cell in the middle
    pixels[..., first : first + config.upscale, first : first + config.upscale].sum().backward()
    touched = latents.grad.abs().sum(dim=(0, 1)).sum(dim=1).nonzero().flatten()
    assert touched[0] == middle - config.reach and touched[-1] == middle + config.reach


def test_a_new_decoder_starts_with_blocks_that_do_nothing_and_every_weight_learns():
    torch.manual_seed(0)
    network = StageAFast(StageAFastConfig(channels=(8, 8), blocks=(1, 1)))
    latents = torch.randn(2, 4, 5, 6)
    plain = StageAFast(StageAFastConfig(channels=(8, 8), blocks=(0, 0)))
    plain.load_state_dict(
        {key: value for key, value in network.state_dict().items() if ".blocks." not in key}
    )
    assert torch.equal(network(latents), plain(latents))
    network(latents).square().sum().backward()
    moved = [
        bool(one.grad.any()) for name, one in network.named_parameters() if "expand" not in name
    ]
    assert all(moved)


def test_in_stage_as_place_it_encodes_as_stage_a_and_decodes_as_itself():
    torch.manual_seed(0)
    stage_a = StageA(STAGE_A).eval()
    fast = made(StageAFastConfig(channels=(8, 8), blocks=(1, 1)))
    joined = FastDecodedStageA.of(stage_a, fast)
    pixels = torch.rand(1, 3, 16, 16)
    latents = stage_a.encode(pixels)
    assert torch.equal(joined.encode(pixels), latents)
    assert torch.equal(joined.decode(latents), fast(latents))
    assert not joined.training and joined.downscale == 4
    assert joined.config.decoder_reach == fast.config.reach
    assert joined.config.encoder_reach == stage_a.config.encoder_reach
    assert not any(parameter.is_meta for parameter in joined.parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (StageAFastConfig(channels=(8,), blocks=(1,)), "2 pixels of a cell's side, but Stage A's"),
        (StageAFastConfig(latent_channels=8), "latents of 8 channels, but Stage A's have 4"),
    ],
)
def test_a_decoder_of_other_latents_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        FastDecodedStageA.of(StageA(STAGE_A), StageAFast(config))
