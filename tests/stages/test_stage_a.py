from __future__ import annotations

import pytest
import torch
from torch import nn

from stages.stage_a import StageA, StageABlock, StageAConfig

TINY = StageAConfig(channels=(8, 12), decoder_blocks=(2, 1), codebook_size=16)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def randomised(config: StageAConfig) -> StageA:
    """A network in which no scalar and no statistic is at its neutral value."""
    torch.manual_seed(0)
    network = StageA(config)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, StageABlock):
                module.gammas.normal_(0, 0.5)
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return network


def test_the_published_network_has_the_published_counts():
    with torch.device("meta"):
        network = StageA(StageAConfig())
    assert num_parameters(network) == 18_406_894
    assert num_parameters(network.encoder) == 2_667_284
    assert num_parameters(network.decoder) == 15_706_842
    assert num_parameters(network.quantizer) == 32_768
    assert len(network.state_dict()) == 122
    assert sum(buffer.numel() for buffer in network.buffers()) == 9
    assert network.downscale == 4
    assert StageAConfig.v3() == StageAConfig() and StageAConfig.v3().scale == 0.43
    assert StageAConfig.v2().scale == 0.3764


def test_published_shapes_at_1024_pixels():
    with torch.device("meta"):
        network = StageA(StageAConfig())
        latents = network.encode(torch.empty(1, 3, 1024, 1024))
        assert latents.shape == (1, 4, 256, 256)
        assert network.decode(latents).shape == (1, 3, 1024, 1024)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (28, 36), (12, 20)])
def test_any_multiple_of_the_downscale_survives_the_round_trip(height, width):
    network = randomised(TINY).eval()
    latents = network.encode(torch.rand(2, 3, height, width))
    assert latents.shape == (2, 4, height // 4, width // 4)
    assert network.decode(latents).shape == (2, 3, height, width)


def test_other_level_counts_and_patch_sizes_work():
    config = StageAConfig(
        channels=(4, 8, 12), encoder_blocks=(0, 1, 2), decoder_blocks=(1, 0, 2), patch_size=1
    )
    network = StageA(config)
    assert network.downscale == 4
    assert network(torch.rand(1, 3, 20, 12)).pixels.shape == (1, 3, 20, 12)


def test_a_new_block_is_the_identity():
    x = torch.randn(2, 8, 5, 7)
    assert torch.equal(StageABlock(8, expansion=4)(x), x)


def test_a_block_computes_what_its_formula_says():
    torch.manual_seed(0)
    block = StageABlock(8, expansion=2)
    nn.init.normal_(block.gammas)
    x, g = torch.randn(2, 8, 5, 7), block.gammas

    def normed(x):
        return (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-6).sqrt()

    h = nn.functional.pad(normed(x) * (1 + g[0]) + g[1], (1, 1, 1, 1), mode="replicate")
    y = x + block.depthwise(h) * g[2]
    h = (normed(y) * (1 + g[3]) + g[4]).permute(0, 2, 3, 1)
    mlp = block.project(nn.functional.gelu(block.expand(h))).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x), y + mlp * g[5])


def test_decode_undoes_the_scale_of_encode():
    pixels = torch.rand(1, 3, 16, 16)
    network = randomised(TINY).eval()
    unscaled = network(pixels, quantize=False)
    torch.testing.assert_close(network.encode(pixels) * 0.43, unscaled.latents)
    torch.testing.assert_close(network.decode(network.encode(pixels)), unscaled.pixels)


def test_quantised_training_output_decodes_the_codes():
    network = randomised(TINY).eval()
    out = network(torch.rand(2, 3, 12, 20))
    codes = network.quantizer.codes(out.indices)
    torch.testing.assert_close(out.pixels, network.decoder(codes), atol=1e-5, rtol=1e-4)
    assert out.indices.shape == (2, 3, 5)
    assert out.codebook_loss > 0 and out.commitment_loss > 0


def test_without_quantisation_there_are_no_codes_and_no_losses():
    out = randomised(TINY)(torch.rand(1, 3, 8, 8), quantize=False)
    assert out.indices is None
    assert out.codebook_loss == 0 and out.commitment_loss == 0


def test_gradients_reach_every_parameter():
    network = randomised(TINY)
    out = network(torch.rand(2, 3, 16, 12))
    (out.pixels.square().mean() + out.codebook_loss + 0.25 * out.commitment_loss).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_new_network_overfits_one_batch():
    torch.manual_seed(0)
    network = StageA(TINY)
    pixels = torch.rand(2, 3, 8, 8)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        out = network(pixels, quantize=False)
        losses.append(nn.functional.mse_loss(out.pixels, pixels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]


def test_nothing_inside_leaves_channels_last_memory():
    network = randomised(TINY)
    offenders = []

    def check(module, _inputs, output):
        # Linear layers see (B, H, W, C), which is the same memory under another name.
        if not isinstance(module, nn.Linear) and output.ndim == 4:
            if not output.is_contiguous(memory_format=torch.channels_last):
                offenders.append(module)

    for part in (network.encoder, network.decoder):
        for module in part.modules():
            module.register_forward_hook(check)
    network.decode(network.encode(torch.rand(2, 3, 28, 36)))
    assert not offenders


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_stays_close_to_float32(autocast):
    network = randomised(TINY).eval()
    pixels = torch.rand(1, 3, 16, 16)
    expected = network.encode(pixels)
    if autocast:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = network.encode(pixels)
    else:
        actual = network.bfloat16().encode(pixels.bfloat16())
        assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).abs().max() < 0.05 * expected.std()


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="18x16: both sides must be multiples of 4"):
        StageA(TINY).encode(torch.rand(1, 3, 18, 16))
    with pytest.raises(ValueError, match="one entry per level"):
        StageAConfig(channels=(8, 16, 32))
    with pytest.raises(ValueError, match="must not be negative"):
        StageAConfig(encoder_blocks=(1, -1))
    with pytest.raises(ValueError, match="patch_size=0"):
        StageAConfig(patch_size=0)
    with pytest.raises(ValueError, match="scale"):
        StageAConfig(scale=0.0)
